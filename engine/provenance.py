"""Where a checkpoint came from: the files that lie beside its tensors and make it stand alone."""

import json
from collections.abc import Mapping

import torch

from engine.adapted_step import ADAPTERS_NAME, encode_specs
from engine.hf_io import HfAssets, asset_files
from engine.logging import environment_report

CONFIG_NAME = "config.toml"
PROVENANCE_NAME = "provenance.json"
HF_PREFIX = "hf/"


def checkpoint_files(
    *, config_toml: str, hf: HfAssets, dtype: torch.dtype, facts: Mapping[str, object]
) -> dict[str, bytes]:
    """Return what lies beside the tensors of every checkpoint, by path inside its folder.

    The resolved configuration, all of a Hugging Face folder but the weights (under `hf/`), what the
    adapters are where there are some, and `provenance.json`: commit, versions, and `facts` that
    only the caller knows, such as the data's fingerprint and the mesh.
    """
    provenance = {**environment_report(), **facts}
    files = {HF_PREFIX + name: content for name, content in asset_files(hf, dtype).items()}
    if hf.adapters is not None:
        files[ADAPTERS_NAME] = encode_specs(hf.adapters.specs)
    files[CONFIG_NAME] = config_toml.encode()
    files[PROVENANCE_NAME] = json.dumps(provenance, indent=1, sort_keys=True).encode()
    return files
