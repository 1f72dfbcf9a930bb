"""The method from end to end, through the Python API: the first test to read.

Count which experts the text uses. Adapt the hottest of each layer. Train the adapters alone. Fold them into the weights
and save a checkpoint in the format of the hub. The model is a random OLMoE: 4 layers of 7 experts, 3 per token.
"""

import torch
from safetensors.torch import load_file

from data import Encoded, collate
from hellora import attach, count_parameters, merge, select_experts
from model import load_model, save_model
from profile import count_experts


def test_count_choose_attach_train_merge_save(olmoe, tmp_path):
    model = load_model(olmoe.folder)
    ids = torch.randint(2, 61, (5, 11), generator=torch.Generator().manual_seed(0))
    batch = collate([Encoded(row, ((4, len(row)),)) for row in ids.tolist()], pad_id=1)  # the last 7 tokens are targets
    with torch.no_grad():
        base_logits, selected_experts = model(ids)  # [5, 11, 61], [4, 5, 11, 3]

    counts = count_experts(model, [batch])  # [4, 7]
    assert torch.equal(counts, torch.stack([layer.flatten().bincount(minlength=7) for layer in selected_experts]))
    hot = select_experts("hot", counts, num_hot=2)  # bool [4, 7]
    for count, is_hot in zip(counts, hot, strict=True):
        assert is_hot.sum() == 2 and count[is_hot].min() >= count[~is_hot].max()

    attach(model, hot, r=3, alpha=6)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], base_logits)  # B starts at zero, so nothing has changed yet
    trainable, total = count_parameters(model)
    assert 0 < trainable < total / 2

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(9):
        loss = model(batch.input_ids, batch.lengths, labels=batch.labels)[0] / (5 * 7)  # nats per target token
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5

    with torch.no_grad():
        adapted_logits, _ = model(ids)
        merge(model)  # W <- W + (alpha / r) B A
        save_model(model, tmp_path)
        torch.testing.assert_close(load_model(tmp_path)(ids)[0], adapted_logits, rtol=0, atol=1e-4)
    before, after = load_file(olmoe.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for layer, expert in hot.new_ones(4, 7).nonzero().tolist():
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(before[name], after[name]) != hot[layer, expert]  # the hot experts changed, no other
