"""The public GPT-2 models: their names, and the commit and digests that each is held to."""

from collections.abc import Mapping
from dataclasses import dataclass

TOKENIZER_DIGESTS = {  # SHA-256 of the same three files in all of them
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
}


@dataclass(frozen=True)
class PublicModel:
    """A model with GPT-2's tokenizer that is known by name, and what its files must be.

    A digest is the SHA-256 of a file, which fixes its size as well.
    """

    name: str
    """Its short id on the Hub, and the name of its preset."""
    hub_id: str
    """Its full id on the Hub, OWNER/NAME."""
    commit: str
    """The revision that is meant where none is named."""
    config_digest: str
    weights_digest: str
    """Of model.safetensors."""
    of_english_web: bool
    """Whether it was trained on WebText or its likeness."""

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file name, of the pinned commit."""
        own = {"config.json": self.config_digest, "model.safetensors": self.weights_digest}
        return own | TOKENIZER_DIGESTS


# Each commit and digest is stated alike by at least two public projects, among them:
#   gpt2         huggingface_hub's ResolvedRevision docs (commit); SyedNaveedMahmood/kd-sink
#                protocols/s1_artifact_partial_v1.json (commit, config); weights: many manifests
#   gpt2-medium  soyuniverse/NetLLM docs/experiment_phase/phase2a/GPT2_ARTIFACT_MANIFEST.md (all)
#   gpt2-large   kd-sink, the same file (all); andreas2301/ola-guardrails models.sha256 (files)
#   gpt2-xl      mikepfrank/GPT-2-tools src/gpt2_local/runtime.py (commit, weights); config: the
#                fingerprint lists of two studies
#   distilgpt2   the Hub's list through hf-mirror.com (commit, weights); config: many manifests
PUBLIC_MODELS = (
    PublicModel(
        name="gpt2",
        hub_id="openai-community/gpt2",
        commit="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        config_digest="0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        weights_digest="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        of_english_web=True,
    ),
    PublicModel(
        name="gpt2-medium",
        hub_id="openai-community/gpt2-medium",
        commit="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        config_digest="ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22",
        weights_digest="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        of_english_web=True,
    ),
    PublicModel(
        name="gpt2-large",
        hub_id="openai-community/gpt2-large",
        commit="32b71b12589c2f8d625668d2335a01cac3249519",
        config_digest="7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170",
        weights_digest="5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
        of_english_web=True,
    ),
    PublicModel(
        name="gpt2-xl",
        hub_id="openai-community/gpt2-xl",
        commit="15ea56dee5df4983c59b2538573817e1667135e2",
        config_digest="be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
        weights_digest="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        of_english_web=True,
    ),
    PublicModel(
        name="distilgpt2",
        hub_id="distilbert/distilgpt2",
        commit="2290a62682d06624634c1f46a6ad5be0f47f38aa",
        config_digest="4ec5947c1d59fee6212cdf3b0ec1a53eac02092554c5ff0a733488cbd2c64f3a",
        weights_digest="e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
        of_english_web=True,
    ),
)


def public_model(source: str) -> PublicModel | None:
    """The public model of a short or full id; None for every other source."""
    return next((model for model in PUBLIC_MODELS if source in (model.name, model.hub_id)), None)


def ids_of(repo: str) -> tuple[str, ...]:
    """The ids under which the Hub has the same repository, the given one first."""
    model = public_model(repo)
    if model is None:
        return (repo,)
    return (repo, model.hub_id if repo == model.name else model.name)


def pinned_digests(repo: str, commit: str) -> Mapping[str, str]:
    """SHA-256 by file name, where it is known from more than the server's word."""
    model = public_model(repo)
    return model.digests if model is not None and model.commit == commit else {}
