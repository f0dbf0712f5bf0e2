"""What a model is, in the field names of TensorRT-LLM's `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from tpllm.errors import DataError
from tpllm.mapping import padded
from tpllm.quantization import ALGOS, GROUP

DTYPES = ("float32", "float16", "bfloat16")
LAYOUT = "plain"  # of quantized weights: not TensorRT-LLM's, whose files say nothing
MAX_LAYERS = 10_000  # a torn number of layers must not become a table of billions


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaled RoPE; the defaults are Meta's published constants."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        require_positive(self, *(f.name for f in fields(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RopeScaling:
        kind = data.get("type", data.get("rope_type"))
        if kind != "llama3":
            raise DataError(f"rotary_scaling of type {kind!r} is not supported; 'llama3' is")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})

    def to_json(self) -> dict[str, Any]:
        # Both spellings: TensorRT-LLM reads `type`, newer Hugging Face code `rope_type`.
        return {"type": "llama3", "rope_type": "llama3", **asdict(self)}


@dataclass(frozen=True)
class ModelConfig:
    """Global sizes of a model; they never change with the number of ranks (`LocalSizes` does)."""

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    norm_epsilon: float
    rotary_base: float
    max_position_embeddings: int
    rotary_scaling: RopeScaling | None = None
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    quant_algo: str | None = None  # how layers' matrices are stored: see `tpllm/quantization.py`

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DataError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(self.architecture, str) or not isinstance(self.use_parallel_embedding, bool):
            raise DataError(f"architecture is {self.architecture!r}, use_parallel_embedding "
                            f"{self.use_parallel_embedding!r}; a name and true or false are needed")
        if self.embedding_sharding_dim not in (0, 1):
            raise DataError(f"embedding_sharding_dim is {self.embedding_sharding_dim}; 0 (vocabulary) or 1 (hidden)")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise DataError(f"{name} is {value!r}; a positive whole number is needed")
        if self.num_hidden_layers > MAX_LAYERS:
            raise DataError(f"num_hidden_layers is {self.num_hidden_layers}; up to {MAX_LAYERS} are possible")
        require_positive(self, "norm_epsilon", "rotary_base")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DataError(f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                            f"num_key_value_heads ({self.num_key_value_heads})")
        if self.head_size % 2:
            raise DataError(f"head_size is {self.head_size}; rotary embedding needs an even one")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Read TensorRT-LLM's `config.json`; unknown keys are ignored, as it does itself."""
        refuse_unsupported(data)
        try:
            heads = data["num_attention_heads"]
            config = cls(
                architecture=data["architecture"], dtype=data["dtype"], vocab_size=data["vocab_size"],
                hidden_size=data["hidden_size"], num_hidden_layers=data["num_hidden_layers"],
                num_attention_heads=heads, num_key_value_heads=data.get("num_key_value_heads") or heads,
                head_size=data.get("head_size") or data["hidden_size"] // heads,
                intermediate_size=data.get("intermediate_size") or 4 * data["hidden_size"],
                norm_epsilon=data.get("norm_epsilon", 1e-5), rotary_base=data.get("rotary_base", 10000.0),
                max_position_embeddings=data["max_position_embeddings"],
                rotary_scaling=RopeScaling.from_json(data["rotary_scaling"]) if data.get("rotary_scaling") else None,
                use_parallel_embedding=data.get("use_parallel_embedding", False),
                embedding_sharding_dim=data.get("embedding_sharding_dim", 0),
                quant_algo=(data.get("quantization") or {}).get("quant_algo") or None,
            )
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            raise DataError(f"the model's config.json is not valid: {type(e).__name__}: {e}") from None
        if data.get("rotary_embedding_dim", config.head_size) != config.head_size:
            raise DataError(f"rotary_embedding_dim {data['rotary_embedding_dim']} is not supported; the head size "
                            f"{config.head_size} is")
        return config

    def to_json(self) -> dict[str, Any]:
        """The model's part of `config.json`, with the constants that TensorRT-LLM expects beside it."""
        data = asdict(self)
        data["rotary_scaling"] = self.rotary_scaling.to_json() if self.rotary_scaling else None
        algo = data.pop("quant_algo")
        return data | {
            "quantization": {"quant_algo": algo, "kv_cache_quant_algo": None, "group_size": GROUP,
                             **({"layout": LAYOUT} if algo else {})},
            "logits_dtype": "float32", "hidden_act": "silu", "position_embedding_type": "rope_gpt_neox",
            "rotary_embedding_dim": self.head_size, "mlp_bias": False, "attn_bias": False,
        }

    def tp_problem(self, tp: int) -> str | None:
        """Why this model cannot be split over `tp` ranks, or None."""
        heads, kv, inter = self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        if heads % tp:
            return f"its {heads} attention heads are not divisible by {tp}"
        if kv % tp and tp % kv:
            return f"its {kv} key/value heads are neither divisible by {tp} nor a divisor of it"
        if inter % tp:
            return f"its intermediate size {inter} is not divisible by {tp}"
        if self.use_parallel_embedding and self.embedding_sharding_dim == 1 and self.hidden_size % tp:
            return f"its hidden size {self.hidden_size} is not divisible by {tp}"
        return None

    def valid_tp_sizes(self, limit: int = 64) -> list[int]:
        """The tensor-parallel sizes up to `limit` that this model can be split over."""
        return [n for n in range(1, limit + 1) if self.tp_problem(n) is None]

    def local(self, tp_size: int) -> LocalSizes:
        """What one of `tp_size` ranks holds."""
        return LocalSizes(
            num_heads=self.num_attention_heads // tp_size,
            num_kv_heads=max(1, self.num_key_value_heads // tp_size),
            intermediate_size=self.intermediate_size // tp_size,
            vocab_size=padded(self.vocab_size, tp_size) // tp_size,
        )


@dataclass(frozen=True)
class LocalSizes:
    """Sizes of one rank's share; `vocab_size` counts padding rows."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int


def require_positive(config: object, *names: str) -> None:
    """Refuse fields that are no numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise DataError(f"{name} is {value!r}; a number above 0 is needed")


def refuse_unsupported(data: dict[str, Any]) -> None:
    """Refuse by name what would otherwise be silently ignored."""
    quantization = data.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise DataError(f"quantization is {quantization!r}; a JSON object is needed")
    plain = (quantization.get("layout"), quantization.get("group_size")) == (LAYOUT, GROUP)
    for key in ("quant_algo", "quant_aglo", "kv_cache_quant_algo"):  # the second: quant_algo as some pages spell it
        if (algo := quantization.get(key)) and not (plain and key == "quant_algo" and algo in ALGOS.values()):
            name = key.replace("aglo", "algo")
            raise DataError(f"{name} {algo!r} is not supported: TensorRT-LLM lays such weights out for its own "
                            "kernels, so they cannot be cut or read elsewhere; convert the original weights")
    for key in ("mlp_bias", "qk_layernorm", "residual_mlp"):
        if data.get(key):
            raise DataError(f"the model has {key}, which is not supported")
    moe = (data.get("moe") or {}).get("num_experts") or data.get("moe_num_experts")
    if moe:
        raise DataError(f"the model is a mixture of {moe} experts; dense LLaMA models are supported")
    for key, supported in (("position_embedding_type", ("rope_gpt_neox",)), ("hidden_act", ("silu", "swiglu"))):
        if data.get(key, supported[0]) not in supported:
            raise DataError(f"{key} {data[key]!r} is not supported; {supported[0]!r} is")
