"""Recovery of int8 accuracy by distillation from fp32."""

__all__: list[str] = []
