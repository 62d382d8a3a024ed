import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_inputs, tiny_transformer
from toy import AffineFlow

from linvideo.evaluation.velocity import velocity_errors

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


def by_hand(mover, other, noise, embeds, negative, guidance, steps):
    """A plain Euler loop over the scheduler's sigmas."""
    SCHEDULER.set_timesteps(steps)
    sigmas, x, error = SCHEDULER.sigmas, noise, 0.0
    for s, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = (1000 * s).expand(len(x))
        u, u_other = (m(x, timestep, embeds)[0].detach() for m in (mover, other))
        error += float((s - after) * (u - u_other).square().mean())
        if guidance > 1:
            u_negative = mover(x, timestep, negative)[0].detach()
            u = u_negative + guidance * (u - u_negative)
        x = x + (after - s) * u
    return error, x


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_errors_and_samples_equal_a_plain_loop(guidance, batch_size):
    student, teacher = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1)
    noise, embeds, negative = torch.randn(5, 2, 1, 2, 2), torch.randn(5, 3, 4), torch.randn(1, 3, 4)
    result = velocity_errors(
        student, teacher, noise, embeds, SCHEDULER, 6, negative, guidance_scale=guidance, batch_size=batch_size
    )
    spread = negative.expand(5, -1, -1)
    own, student_samples = by_hand(student, teacher, noise, embeds, spread, guidance, 6)
    on_teacher, teacher_samples = by_hand(teacher, student, noise, embeds, spread, guidance, 6)
    assert result["own_state_error"] == pytest.approx(own, rel=1e-4)
    assert result["teacher_state_error"] == pytest.approx(on_teacher, rel=1e-4)
    assert torch.allclose(result["student_samples"], student_samples, atol=1e-4)
    assert torch.allclose(result["teacher_samples"], teacher_samples, atol=1e-4)
    assert result["own_state_error"] != pytest.approx(result["teacher_state_error"], rel=1e-3)


def test_a_model_has_no_error_against_itself():
    model, inputs = tiny_transformer(), tiny_inputs()
    result = velocity_errors(
        model, model, inputs["hidden_states"], inputs["encoder_hidden_states"], SCHEDULER, num_inference_steps=3
    )
    assert result["own_state_error"] == result["teacher_state_error"] == 0
    assert torch.equal(result["student_samples"], result["teacher_samples"])


def test_bad_input():
    model = AffineFlow(0.1)
    with pytest.raises(ValueError, match="one prompt embedding per noise, got 2 for 3"):
        velocity_errors(model, model, torch.randn(3, 2, 1, 2, 2), torch.randn(2, 3, 4), SCHEDULER, 2)
    with pytest.raises(ValueError, match="needs conditions of the negative prompt"):
        velocity_errors(
            model, model, torch.randn(2, 2, 1, 2, 2), torch.randn(2, 3, 4), SCHEDULER, 2, guidance_scale=2.0
        )
