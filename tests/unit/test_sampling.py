import torch

from convexprune.adapters import calibration_and_held_out


def sample(model, num_samples=4, max_seq_length=16, seed=0, **options):
    return calibration_and_held_out(
        "self", model, num_samples=num_samples, max_seq_length=max_seq_length, seed=seed, **options
    )[0]


def test_sampled_text_is_the_same_for_a_seed_and_other_for_another(tiny_opt):
    first, again, other = (sample(tiny_opt, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (4, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_is_sampled_from_a_stream_that_no_calibration_uses(tiny_opt):
    evaluation = sample(tiny_opt, split="evaluation", seed=0)
    for seed in range(4):
        calibration = sample(tiny_opt, seed=seed)
        assert not any(torch.equal(a, b) for a in calibration for b in evaluation)


def test_sampling_leaves_the_callers_random_numbers_and_the_models_settings_alone(tiny_opt):
    state, settings = torch.get_rng_state(), tiny_opt.model.generation_config
    sample(tiny_opt)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_opt.model.generation_config is settings


def test_sampled_text_starts_as_texts_start(tiny_llama):
    for start, end, expected in ((7, 5, 7), (None, 5, 5), (None, [6, 5], 6)):
        tiny_llama.model.config.bos_token_id, tiny_llama.model.config.eos_token_id = start, end
        assert sample(tiny_llama)[:, 0].tolist() == [expected] * 4


def test_a_model_without_special_tokens_starts_from_a_random_one(tiny_llama):
    tiny_llama.model.config.bos_token_id = tiny_llama.model.config.eos_token_id = None
    starts = {int(sample(tiny_llama, seed=seed)[0, 0]) for seed in range(3)}
    assert len(starts) > 1


def test_sampled_text_follows_the_models_distribution_whatever_its_generation_settings(tiny_opt):
    # A model whose logits do not depend on its input draws each token alike, its end token 0 among them.
    wanted = torch.tensor([0.5, 0.25, 0.25])
    embedding = tiny_opt.model.get_input_embeddings().weight
    norm = tiny_opt.model.get_submodule("model.decoder.final_layer_norm")
    embedding.data.zero_()
    embedding.data[:, 0] = -1e4
    embedding.data[:3, 0] = wanted.log()
    norm.weight.data.zero_()
    norm.bias.data.copy_(torch.eye(32)[0])
    tiny_opt.model.generation_config.update(repetition_penalty=5.0, eos_token_id=0, suppress_tokens=[1], top_k=1)
    drawn = sample(tiny_opt, num_samples=64, max_seq_length=33)[:, 1:]
    shares = drawn.flatten().bincount(minlength=3) / drawn.numel()
    assert drawn.max() <= 2
    torch.testing.assert_close(shares, wanted, atol=0.05, rtol=0)  # four standard deviations of 2048 draws


def test_more_samples_than_one_batch_are_all_different(tiny_opt, monkeypatch):
    monkeypatch.setattr("convexprune.adapters._data.sampling.BATCH_TOKENS", 48)
    windows = sample(tiny_opt, num_samples=7)
    assert len(windows.unique(dim=0)) == 7
