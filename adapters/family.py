"""What convexprune knows of an architecture: where its decoder layers are and what runs in them, as data."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from convexprune.errors import ModelError, unknown


@dataclass(frozen=True)
class Family:
    """One architecture.

    `layers` is the dotted path from the model to its list of decoder layers. `stages` groups the names of a layer's
    operators, relative to the layer and in order of execution, by the input that they share.
    """

    model_type: str
    layers: str
    stages: tuple[tuple[str, ...], ...]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="opt",
            layers="model.decoder.layers",
            stages=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.out_proj",),
                ("fc1",),
                ("fc2",),
            ),
        ),
        Family(
            model_type="llama",
            layers="model.layers",
            stages=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            ),
        ),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model with this configuration.

    Raises:
        ModelError: the model type belongs to no family that is known; the message lists those that are.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(unknown("model family", config.model_type, FAMILIES))
    return FAMILIES[config.model_type]
