"""Adapters in the ways people use models: a plain training loop, a pipeline."""

import torch

import inarch
from inarch.testing import tiny, tiny_inputs


def test_a_plain_loop_trains_the_adapter_and_leaves_the_base_bit_for_bit():
    model = tiny("vit-classifier")
    base = {key: tensor.clone() for key, tensor in model.vit.state_dict().items()}
    adapters = inarch.attach(model)
    adapters.add("task", "seq_bn[reduction_factor=2]")
    adapters.train("task")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, labels = tiny_inputs("vit-classifier", batch=5), torch.arange(5)
    model.train()
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    adapters.detach()
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.vit.state_dict().items())


def test_a_pipeline_runs_the_active_adapter():
    from PIL import Image
    from transformers import ViTImageProcessorPil, pipeline

    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    adapters.add("task", "double_seq_bn|lora[init_weights=bert]")
    with torch.no_grad():
        for parameter in adapters["task"].values():
            parameter.add_(torch.randn_like(parameter))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.linear_gradient("L").convert("RGB")
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")

    def scores():
        return {row["label"]: row["score"] for row in classify(image)}

    before = scores()
    adapters.activate("task")
    pixels = processor(image, return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits.softmax(-1)[0]
    found = scores()
    assert found != before
    for number, label in model.config.id2label.items():
        assert abs(found[label] - expected[number].item()) < 1e-6
    adapters.deactivate()
    assert scores() == before
