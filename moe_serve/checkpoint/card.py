"""The model card (``README.md``) of a written checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from moe_serve.checkpoint.manifest import Manifest
from moe_serve.files import write_atomic

_TEMPLATE: Final = """\
---
library_name: {{ library }}
pipeline_tag: text-generation
license: other
license_name: as-original
{% if base -%}
base_model: {{ base }}
{% endif -%}
tags:
- mixture-of-experts
- pruned
- moe-serve
---
# {{ name }}, experts pruned to {{ "%.1f" | format(percent) }} %

Made from `{{ name }}` by moe-serve {{ version }} with `{{ method }}` (format `{{ format }}`).
Routed experts: {{ "{:,}".format(original) }} bytes before, {{ "{:,}".format(kept) }} bytes now.
{% if numbers -%}
Stored as {{ numbers.schemes | join("; ") }}. {% for name, count in numbers.kept.items() -%}
{{ name }}: {{ count }} blocks byte for byte, {{ numbers.requantised[name] }} rounded again\
{{ ". " if loop.last else "; " }}{% endfor %}
{% endif -%}
The original's licence and terms of use apply to this derivative.

{% set constants = format == "substitution" -%}
| layer | blocks | neurons per block | experts \
{{ "replaced by a constant" if constants else "never selected" }} |
|---|---|---|---|
{% for index, layer in layers.items() -%}
| {{ index }} | {{ layer.blocks }} | {{ layer.width }} | \
{{ layer.replaced if constants else layer.dropped }} |
{% endfor %}
{% if left_out -%}
## Left out

Layers {{ left_out.layers | join(", ") }} ({{ "{:,}".format(left_out.bytes) }} bytes) predicted \
further tokens for speculative decoding. They draft for the original model and are not in this \
one; draft with another method.

{% endif -%}
{% if format == "compact" -%}
## Serving

{% if served -%}
Needs vLLM with the moe-serve plugin; stock vLLM refuses the architecture by name.

    moe-serve up --original ORIGINAL --pruned .
{% else -%}
The moe-serve plugin does not serve this architecture; write a form that stock software loads:

    moe-serve export . STOCK --format tied
{% endif -%}
{% elif format == "substitution" -%}
## Serving

Needs vLLM 0.33 or later (`approximate_experts`), one GPU or tensor parallelism: expert, data and \
sequence parallelism, EPLB and LoRA are refused there. vLLM 0.32 and transformers do not know the \
constants and would compute something else.

    vllm serve .

{% else -%}
## Serving

Loads in software that supports the original architecture.
{% endif %}
## Calibration
{% if calibration %}
{{ "{:,}".format(calibration.tokens.values() | sum) }} tokens from \
{{ calibration.domains | length }} domains:
{% for domain, count in calibration.tokens.items() -%}
{{ domain }} ({{ "{:,}".format(count) }}){{ "." if loop.last else ", " }}
{%- endfor %}

{% for source in sources -%}
- {{ source.name }} (SHA-256 {{ source.sha256 }}, {{ source.documents }} documents\
{% if source.licences %}, {{ source.licences | join(", ") }}{% endif %}): \
{% if source.declaration -%}
licence {{ source.declaration.licence }}, owner {{ source.declaration.owner }}, personal data: \
{{ source.declaration.personal_data }}\
{%- if source.declaration.approval %}, approved by {{ source.declaration.approval.by }} on \
{{ source.declaration.approval.on }}{% endif %}
{%- else -%}
**undeclared**, nobody stated owner, licence and terms
{%- endif %}
{% endfor %}
{%- else %}
None: chosen from the weights alone.
{% endif %}
Why each expert was kept, merged or dropped, and the risks: `moe-serve report . -o report.html`.
Quality has to be measured on your own texts: `moe-serve compare ORIGINAL THIS --texts PATH`.
"""


def write_card(folder: Path, manifest: Manifest, *, served: bool) -> None:
    """Put the card into a written checkpoint; see :func:`model_card`."""
    write_atomic(folder / "README.md", model_card(manifest, served=served).encode())


def model_card(manifest: Manifest, *, served: bool) -> str:
    """Render the card from what the manifest knows.

    Args:
        manifest: of the written checkpoint.
        served: whether the vLLM plugin serves the family's compact form.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
    bytes_ = manifest.expert_bytes
    return environment.from_string(_TEMPLATE).render(
        library="vllm" if manifest.format in {"compact", "substitution"} else "transformers",
        name=manifest.original.name,
        base=json.dumps(manifest.original.name) if _is_hub_name(manifest.original.name) else None,
        percent=100 * bytes_.kept / bytes_.original,
        version=manifest.moe_serve_version,
        method=manifest.method,
        format=manifest.format,
        original=bytes_.original,
        kept=bytes_.kept,
        layers=manifest.layers,
        numbers=manifest.numbers,
        calibration=manifest.calibration,
        sources=manifest.sources(),
        served=served,
        left_out=manifest.prediction_layers
        if manifest.prediction_layers and not manifest.prediction_layers.kept
        else None,
    )


def _is_hub_name(name: str) -> bool:
    """Whether the hub takes it for a model's; it rejects metadata that names another."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII) is not None
