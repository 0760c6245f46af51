"""``--load-format moe_serve``: vLLM's safetensors loader, with everything checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from moe_serve_vllm.errors import UnsupportedSettings
from moe_serve_vllm.files import check_files, check_hashes
from moe_serve_vllm.reports import bytes_of, watch
from moe_serve_vllm.support import LOAD_FORMAT, config_of, read_tables

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig

logger = init_logger("vllm.moe_serve")

_VERIFY: Final = "verify_hashes"
_registered: list[str] = []


class CompactLoader(DefaultModelLoader):
    """Checks files before, and what was written after loading.

    ``--model-loader-extra-config '{"verify_hashes": true}'`` also compares every file with its
    SHA-256 in ``moe_serve.json``, at the cost of reading all of them once more.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Take our option out and present the rest as the safetensors loader's."""
        extra: dict[str, Any] = dict(load_config.model_loader_extra_config or {})
        self._verify_hashes = bool(extra.pop(_VERIFY, False))
        super().__init__(
            dataclasses.replace(
                load_config, load_format="safetensors", model_loader_extra_config=extra
            )
        )

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load; refuse anything missing, doubled, truncated or left over.

        Raises:
            UnsupportedSettings: the model is not a local compact checkpoint.
            WeightsError: the files are not what the table says.
        """
        from moe_serve_vllm.layers import check_written
        from moe_serve_vllm.weights import every_element_written

        folder = Path(model_config.model)
        vllm_config = get_current_vllm_config()
        config = config_of(vllm_config)
        if not folder.is_dir() or "compact_experts" not in config:
            raise UnsupportedSettings(
                f"--load-format {LOAD_FORMAT}",
                [f"{folder} is not a local directory with a compact checkpoint"],
                "leave --load-format out for other models",
            )
        family, tables = read_tables(vllm_config)
        check_files(folder, family, tables, config)
        if self._verify_hashes:
            logger.info("moe_serve: %d files match their hashes", check_hashes(folder))
        with every_element_written(model, str(folder)) as loaded:
            loaded.update(model.load_weights(self.get_all_weights(model_config, model)))
        check_written(model, str(folder), lambda text: logger.info("moe_serve: %s", text))
        if (reporter := watch(vllm_config)) is not None:
            reporter.weights = bytes_of(model.parameters())

    def download_model(self, model_config: ModelConfig) -> None:
        """Compact checkpoints are local."""


def register_loader() -> None:
    """Make the load format known, once per process."""
    if not _registered:
        register_model_loader(LOAD_FORMAT)(CompactLoader)
        _registered.append(LOAD_FORMAT)
