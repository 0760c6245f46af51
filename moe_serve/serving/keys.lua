-- Who a request is from. Keys are known by their SHA-256 only (FIPS 180-4); the hash of what came
-- is looked up, so no comparison runs over a secret. keys.py fills in what stands between @.
local keys = @KEYS@
local required = @REQUIRED@
local salt = "@SALT@"
local pin_allowed = @PIN_ALLOWED@

local band, bnot, bxor = bit.band, bit.bnot, bit.bxor
local ror, rshift, tobit, tohex = bit.ror, bit.rshift, bit.tobit, bit.tohex

local function primes(count)
  local found, candidate = {}, 2
  while #found < count do
    local prime = true
    for _, p in ipairs(found) do
      if p * p > candidate then break end
      if candidate % p == 0 then prime = false; break end
    end
    if prime then found[#found + 1] = candidate end
    candidate = candidate + 1
  end
  return found
end

-- The first 32 bits of the fractional part. A double has 52 bits of fraction: enough for roots of
-- numbers below 512, whose whole part takes at most five.
local function fraction(x) return tobit(math.floor((x - math.floor(x)) * 4294967296)) end

-- A cube root to the last bit: pow is not exact to it, so one step of Newton's method.
local function cube_root(x)
  local r = x ^ (1 / 3)
  return r - (r * r * r - x) / (3 * r * r)
end

local start, constants = {}, {}
for i, p in ipairs(primes(64)) do
  if i <= 8 then start[i] = fraction(math.sqrt(p)) end
  constants[i] = fraction(cube_root(p))
end

local function sha256(message)
  local bits = #message * 8
  message = message .. "\128" .. string.rep("\0", (55 - #message) % 64) .. "\0\0\0\0"
    .. string.char(band(rshift(bits, 24), 255), band(rshift(bits, 16), 255),
                   band(rshift(bits, 8), 255), band(bits, 255))
  local h = { unpack(start) }
  local w = {}
  for offset = 1, #message, 64 do
    for i = 1, 16 do
      local a, b, c, d = message:byte(offset + 4 * (i - 1), offset + 4 * i - 1)
      w[i] = tobit(a * 16777216 + b * 65536 + c * 256 + d)
    end
    for i = 17, 64 do
      local x, y = w[i - 15], w[i - 2]
      local s0 = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
      local s1 = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
      w[i] = tobit(w[i - 16] + s0 + w[i - 7] + s1)
    end
    local a, b, c, d, e, f, g, k = unpack(h)
    for i = 1, 64 do
      local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
      local choice = bxor(band(e, f), band(bnot(e), g))
      local t1 = tobit(k + s1 + choice + constants[i] + w[i])
      local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
      local majority = bxor(band(a, b), band(a, c), band(b, c))
      local t2 = tobit(s0 + majority)
      k, g, f, e, d, c, b, a = g, f, e, tobit(d + t1), c, b, a, tobit(t1 + t2)
    end
    for i, v in ipairs({ a, b, c, d, e, f, g, k }) do h[i] = tobit(h[i] + v) end
  end
  local text = ""
  for i = 1, 8 do text = text .. tohex(h[i]) end
  return text
end

-- What tells the user of this request apart, as the route says; nil where nothing does.
local function user(handle, headers)
  for _, way in ipairs(handle:metadata():get("sticky") or {}) do
    local kind, name = way:match("^(%a+):(.+)$")
    local value = headers:get(kind == "header" and name or "cookie")
    if value and kind == "cookie" then
      value = ("; " .. value):match("[; ]" .. name:gsub("%-", "%%-") .. "=([^;]+)")
    end
    if value and value ~= "" then return value end
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- Ours alone: what a client sends under this name is somebody else's claim.
  headers:remove("@KEY_HEADER@")
  local key = nil
  local sent = headers:get("authorization")
  if required and headers:get(":path") ~= "/health" then
    local token = sent and sent:match("^[Bb]earer +(%S+)$")
    key = token and #token <= 256 and keys[sha256(token)]
    if not key then
      handle:respond(
        { [":status"] = "401", ["content-type"] = "application/json",
          ["www-authenticate"] = "Bearer" },
        '{"error": {"message": "missing or unknown API key", "type": "invalid_request_error", '
          .. '"param": null, "code": "invalid_api_key"}}')
      return
    end
    headers:add("@KEY_HEADER@", key.name)
    -- The engine has no use for it.
    headers:remove("authorization")
  end
  if not pin_allowed or (key and not key.pin) then headers:remove("@PIN_HEADER@") end
  if key and key.variant then headers:replace("@PIN_HEADER@", key.variant) end
  handle:clearRouteCache()
  local who = user(handle, headers)
  if who then
    -- Counted under a hash: who it was is nobody's business. Salted: names can be guessed.
    local hash = sha256(salt .. who:sub(1, 1024)):sub(1, 16)
    handle:streamInfo():dynamicMetadata():set("moe_serve", "user", hash)
  end
end
