// Keeps the page live: on each event the page is fetched again and what changed is put in place.
// The server renders; there is no second copy of it here. Without this file the page reads as well.
"use strict";

const pulse = document.getElementById("pulse");
const seen = new Map();
let wanted = false;
let busy = false;
let newest = 0;

function localise(root) {
  const language = document.documentElement.lang;
  const whole = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "medium" });
  const near = new Intl.DateTimeFormat(language, { timeStyle: "medium" });
  for (const time of root.querySelectorAll("time")) {
    time.title = time.textContent;
    const form = "near" in time.dataset ? near : whole;
    time.textContent = form.format(new Date(time.dateTime));
  }
}

function beingEdited(part) {
  const inputs = [...part.querySelectorAll("input:not([type=hidden])")];
  return inputs.some((input) => input === document.activeElement || input.value !== input.defaultValue);
}

function replace(old, fresh) {
  const open = [...old.querySelectorAll("details[open]")].map((details) => details.id);
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const summary = focused?.tagName === "SUMMARY" ? focused.parentElement.id : "";
  old.replaceWith(fresh);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  const again = summary
    ? document.getElementById(summary)?.querySelector("summary")
    : focused?.id && document.getElementById(focused.id);
  if (again) again.focus({ preventScroll: true });
}

async function refresh() {
  wanted = true;
  if (busy) return;
  busy = true;
  while (wanted) {
    wanted = false;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" } });
      if (answer.redirected) location.assign(answer.url); // The session has ended.
      if (!answer.ok || answer.redirected) continue;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      newest = Date.now();
      document.title = page.title;
      for (const fresh of page.querySelectorAll("[data-live]")) {
        const old = document.getElementById(fresh.id);
        const text = fresh.outerHTML;
        if (!old || seen.get(fresh.id) === text || beingEdited(old)) continue;
        seen.set(fresh.id, text);
        if (fresh.dataset.live === "text") {
          // Only a region that stays in place is read out.
          old.textContent = fresh.textContent;
          continue;
        }
        localise(fresh);
        replace(old, document.adoptNode(fresh));
      }
    } catch {
      // The stream says whether the server is there.
    }
  }
  busy = false;
}

function tell(live) {
  pulse.className = live ? "pulse live" : "pulse stale";
  const text = live ? pulse.dataset.liveText : pulse.dataset.staleText;
  const place = pulse.querySelector("span");
  if (place.textContent !== text) place.textContent = text;
}

for (const part of document.querySelectorAll("[data-live]")) seen.set(part.id, part.outerHTML);
localise(document);
if (location.search.includes("done=")) history.replaceState(null, "", "/");

const events = new EventSource("/api/events");
events.addEventListener("open", () => tell(true));
events.addEventListener("error", () => tell(false));
events.addEventListener("log", refresh);
events.addEventListener("status", refresh);
// Rates and times to go change without an event.
setInterval(() => {
  if (!document.hidden && Date.now() - newest > 4000) refresh();
}, 5000);
