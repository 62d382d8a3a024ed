"""AdamW with 8-bit state (Dettmers et al., arXiv 2110.02861) by torchao, on whole parameters or FSDP2 shards.

Checkpoints hold the moments in fp32, like those of any other AdamW. They quantize back to the same 8 bits.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit

MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointedAdamW8bit(AdamW8bit):
    def __init__(self, params: Any, **settings: Any):
        super().__init__(params, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = {name: self._new_buffer(parameter, name == "exp_avg") for name in MOMENTS}
                self.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        state = {
            number: {name: _dequantized(value) for name, value in values.items()}
            for number, values in content["state"].items()
        }
        return content | {"state": state}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        with torch.no_grad():
            for number, values in content["state"].items():
                for name, value in values.items():
                    _local(self.state[parameters[number]][name]).copy_(_local(value))
        for group, saved in zip(self.param_groups, content["param_groups"], strict=True):
            group["lr"].fill_(float(saved["lr"]))


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _dequantized(x: torch.Tensor) -> torch.Tensor:
    local = _local(x)
    if type(local) is torch.Tensor:  # torchao doesn't quantize small tensors
        return x
    values = local.dequantize()
    if local.signed:
        # The codes of signed moments cover -0.993 to 1 times the block's scale, which is its largest magnitude. If that
        # value is negative, the lowest code must decode to the full -scale: else the block would shrink on each reload.
        scale = local.scale.repeat_interleave(local.block_size).view_as(values)
        values = torch.where(local.codes == 0, -scale, values)
    if not isinstance(x, DTensor):
        return values
    return DTensor.from_local(values, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
