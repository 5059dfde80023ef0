"""How a client is asked to train: numbers and names only, so that a site can check them against its policy."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["float32", "bfloat16", "float16"]


class Training(BaseModel):
    """Local training of one round. Either `epochs` passes over the client's examples or `steps` batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=1, ge=1, description="passes over the client's examples")
    steps: int | None = Field(default=None, ge=1, description="batches, instead of epochs")
    batch_size: int = Field(default=32, ge=1, description="examples a step; the last of an epoch may be smaller")
    optimizer: str = Field(default="sgd", description="any optimizer of torch.optim, by name")
    learning_rate: float = Field(default=0.1, gt=0, description="in the first round")
    learning_rate_decay: float = Field(default=1.0, gt=0, le=1, description="factor from one round to the next")
    optimizer_arguments: dict[str, Any] = Field(default_factory=dict, description="passed on, e.g. {momentum = 0.9}")
    max_gradient_norm: float | None = Field(
        default=None, gt=0, description="clips each batch's gradient (L2); not privacy"
    )
    precision: Precision = Field(default="float32", description="autocast precision of forward and backward")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("give epochs or steps, not both")
        return self

    def rate(self, round_number: int) -> float:
        """Return the learning rate of round `round_number` (1 is the first)."""
        return self.learning_rate * self.learning_rate_decay ** (round_number - 1)
