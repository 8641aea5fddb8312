"""Every block on every architecture, for every port: against the single adapters that it is made of."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from little_adapters import moved

import inarch
from inarch import Average, BatchSplit, MultiTask, Parallel, Split, Stack
from inarch.compose import Batch, Place
from inarch.compose.batch import Seen
from inarch.core.symbols import symbol
from inarch.methods import method_of, read_config
from inarch.programs import WiredAdapter, rewire
from inarch.testing import tiny, tiny_inputs

ARCHITECTURES = ["vit", "bert", "gpt2", "t5", "clip", "swin", "beit"]
KEYS = ("last_hidden_state", "logits", "image_embeds", "text_embeds", "encoder_last_hidden_state")
CONFIGS = {
    "a": "double_seq_bn[reduction_factor=4,use_gating=True]|lora[init_weights=bert]",
    "b": "adapter_plus[reduction_factor=4]|lora[r=2,attn_matrices=[q,k,v],use_gating=True,init_weights=bert]|ia3",
    "c": "ia3[after_activation=False,output_lora=True]",
    "d": "par_bn|lora[r=3,alpha=5,intermediate_lora=True]",
}


class Letters:
    """A branch as symbols."""

    def __init__(self, name):
        self.name = name

    def branch(self, z):
        return z.applied(self.name)

    def norm_branch(self, w):
        return w


def test_an_average_of_adapters_that_count_the_exchanged_stream_differently_is_the_average():
    """In the exchanged circuit a wiring counts `h`, which what comes after an average must not take for `x`."""
    x, h = symbol("x"), symbol("h")
    wirings = {"a": "", "b": ",residual_before_ln=False"}
    configs = {name: read_config(f"seq_bn[reduction_factor=4{text}]").parts[0] for name, text in wirings.items()}
    configs["c"] = configs["a"]
    adapters = {
        name: WiredAdapter(config=config, method=method_of(config), branch=Letters(name.upper()), circuit="exchanged")
        for name, config in configs.items()
    }

    def handed(setup):
        return rewire(setup, adapters, x, h, others=None, norm=None).branch.vanish("C")

    expected = (handed(Stack("a", "c")) + handed(Stack("b", "c"))) * Fraction(1, 2)
    assert handed(Stack(Average("a", "b"), "c")) == expected


def grafted(name, configs=CONFIGS):
    """A tiny model in double precision with adapters moved off their initial weights."""
    model = tiny(name).double()
    return model, moved(model, configs)


def inputs_of(name, batch=4):
    found = tiny_inputs(name, batch=batch)
    return {key: value.double() if value.is_floating_point() else value for key, value in found.items()}


def outputs(model, inputs, **more):
    """By name, what the model gives for each sample."""
    found = model(**inputs, **more)
    return {key: found[key] for key in KEYS if key in found and key != "logits_per_image"}


def single(model, adapters, inputs, setup):
    with adapters.using(setup):
        return outputs(model, inputs)


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.allclose(value, expected[key], atol=1e-9), (key, (value - expected[key]).abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_that_cut_a_batch_give_what_each_adapter_gives_alone(name):
    """BatchSplit, Parallel and MultiTask, nested too, row by row; and all is undone by deactivating."""
    model, adapters = grafted(name)
    inputs = inputs_of(name)
    with torch.no_grad():
        base = outputs(model, inputs)
        alone = {key: single(model, adapters, inputs, key) for key in "abcd"}
        alone["ca"] = single(model, adapters, inputs, Stack("c", "a"))

        def rows(*parts):
            return {key: torch.cat([alone[n][key][where] for n, where in parts]) for key in base}

        with adapters.using(BatchSplit("a", "b", "d", batch_sizes=[1, 2, 1])):
            close(outputs(model, inputs), rows(("a", [0]), ("b", [1, 2]), ("d", [3])))
        inner = BatchSplit("c", Stack("c", "a"), batch_sizes=[1, 1])
        with adapters.using(BatchSplit(inner, "b", batch_sizes=[2, 2])):
            close(outputs(model, inputs), rows(("c", [0]), ("ca", [1]), ("b", [2, 3])))
        whole = slice(None)
        with adapters.using(Parallel("a", "b", "c")):
            close(outputs(model, inputs), rows(("a", whole), ("b", whole), ("c", whole)))
        with adapters.using(Stack("c", Parallel("a", BatchSplit("a", "a", batch_sizes=2)))):
            close(outputs(model, inputs), rows(("ca", whole), ("ca", whole)))
        ids = torch.tensor([2, 0, 2, 1])
        with adapters.using(MultiTask("a", "b", "d")):
            close(outputs(model, inputs, task_ids=ids), rows(("d", [0]), ("a", [1]), ("d", [2]), ("b", [3])))
            close(outputs(model, inputs, task_ids=list("bbbb")), alone["b"])
        assert all(torch.equal(outputs(model, inputs)[key], value) for key, value in base.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_of_one_adapter_is_that_adapter(name):
    model, adapters = grafted(name)
    inputs = inputs_of(name)
    with torch.no_grad():
        for key in "abcd":
            alone = single(model, adapters, inputs, key)
            for setup in (Average(key, key, weights=[1, 3]), Average(key, weights=[2]), Stack(key)):
                close(single(model, adapters, inputs, setup), alone)
        base = outputs(model, inputs)
        close(single(model, adapters, inputs, Average("a", "d", weights=[0, 0], normalize_weights=False)), base)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "t5"])
def test_an_average_of_lora_is_lora_of_the_average_update(name):
    """Weights times updates, against LoRA with the sums written into the base; normalised and not."""
    configs = {"a": "lora[attn_matrices=[q,k,v,o],init_weights=bert]", "b": "lora[r=2,alpha=6,intermediate_lora=True]"}
    model, adapters = grafted(name, configs)
    inputs = inputs_of(name)
    for setup, shares in (
        (Average("a", "b", weights=[1, 3]), (0.25, 0.75)),
        (Average("a", "b", weights=[2, -0.5], normalize_weights=False), (2, -0.5)),
        (Stack("a", "b"), (1, 1)),
    ):
        found = single(model, adapters, inputs, setup)
        with torch.no_grad():
            before = copy.deepcopy(model.state_dict())
            for key, share in zip("ab", shares, strict=True):
                _write_lora(model, adapters, key, share * {"a": 1.0, "b": 3.0}[key])
            close(outputs(model, inputs), found)
            model.load_state_dict(before)


def _write_lora(model, adapters, name, factor):
    for key, A in adapters[name].items():
        if not key.endswith(".A"):
            continue
        site_key, _, role, _ = key.rsplit(".", 3)
        site = adapters.sites[site_key]
        (projection,) = site.projections[role]
        weight = model.get_submodule(site.absolute(projection.path)).weight
        view = weight.T if projection.transposed else weight
        ((start, stop),) = projection.rows or ((0, projection.out_features),)
        view[start:stop] += adapters[name][key.removesuffix("A") + "B"] @ A * factor


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_an_average_of_bottlenecks_is_the_average_of_what_they_make_of_a_branch(name):
    """Against the formula, by hand: h + sum of shares times (up relu down)(h); one adapter has nothing in a layer."""
    configs = {"a": "bottleneck[reduction_factor=4,leave_out=[0]]", "b": "bottleneck[reduction_factor=4]"}
    model, adapters = grafted(name, configs)
    inputs = inputs_of(name)
    found = single(model, adapters, inputs, Average("a", "b", weights=[1, 3]))

    def by_hand(site):
        def hook(module, args, result):
            h = result[0] if site.output.key else result
            total = h
            for key, share in (("a", 0.25), ("b", 0.75)):
                own = {k.rpartition("bottleneck.")[2]: p for k, p in adapters[key].items() if k.startswith(site.key)}
                if not own:
                    continue
                inner = torch.relu(h @ own["down.weight"].T + own["down.bias"])
                total = total + share * (inner @ own["up.weight"].T + own["up.bias"])
            return (total, *result[1:]) if site.output.key else total

        return hook

    handles = [
        model.get_submodule(site.absolute(site.output.path)).register_forward_hook(by_hand(site))
        for site in adapters.sites
        if site.kind == "mlp"
    ]
    close(outputs(model, inputs), found)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "beit"])
def test_a_split_acts_on_each_ones_tokens_in_the_last_layer(name):
    """In the last layer's MLP a token's result depends on no other token: there it is that of each adapter alone."""
    config = "bottleneck[reduction_factor=4,leave_out=[0]]|lora[leave_out=[0],selfattn_lora=False,output_lora=True]"
    model, adapters = grafted(name, dict.fromkeys("ab", config))
    inputs = inputs_of(name)
    length = outputs(model, inputs)["last_hidden_state"].shape[1]
    found = single(model, adapters, inputs, Split("a", "b", splits=[2, length - 2]))["last_hidden_state"]
    a, b = (single(model, adapters, inputs, key)["last_hidden_state"] for key in "ab")
    assert torch.allclose(found, torch.cat([a[:, :2], b[:, 2:]], dim=1), atol=1e-9)
    assert not torch.allclose(a, b)


def test_a_mean_over_tokens_is_one_over_the_tokens_of_the_child():
    """A gate under `Split` sees the tokens that its adapter sees."""
    model, adapters = grafted("vit", {"a": "seq_bn[use_gating=True,leave_out=[0]]"})
    inputs = inputs_of("vit")
    whole = single(model, adapters, inputs, "a")["last_hidden_state"]
    assert not torch.allclose(
        single(model, adapters, inputs, Split("a", "a", splits=[2, 15]))["last_hidden_state"], whole
    )


@pytest.mark.parametrize("name", ["vit", "bert", "t5"])
@pytest.mark.parametrize("block", ["BatchSplit", "Parallel", "Average", "MultiTask"])
def test_gradients_reach_all_adapters_of_a_block_and_nothing_else(name, block):
    model, adapters = grafted(name, {"a": CONFIGS["a"], "d": CONFIGS["d"]})
    setup = {
        "BatchSplit": BatchSplit("a", "d", batch_sizes=2),
        "Parallel": Parallel("a", "d"),
        "Average": Average("a", "d"),
        "MultiTask": MultiTask("a", "d"),
    }[block]
    adapters.train(setup)
    more = {"task_ids": torch.tensor([0, 1, 1, 0])} if block == "MultiTask" else {}
    found = torch.cat([value.flatten(1) for value in outputs(model, inputs_of(name), **more).values()], dim=1)
    (found * torch.linspace(-1, 1, found.shape[1])).sum().backward()
    own = {**adapters["a"], **{f"{key} of d": p for key, p in adapters["d"].items()}}
    assert [key for key, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    known = {id(p) for p in own.values()}
    assert [key for key, p in model.named_parameters() if p.grad is not None and id(p) not in known] == []


@pytest.mark.parametrize("setup", [Parallel("a", "b"), MultiTask("a", "b"), BatchSplit("a", "b", batch_sizes=2)])
def test_copies_pickles_and_compiled_models_compose_as_well(setup):
    model, adapters = grafted("vit", {"a": "seq_bn", "b": "adapter_plus|lora[init_weights=bert]"})
    more = {"task_ids": torch.tensor([0, 1, 1, 0])} if isinstance(setup, MultiTask) else {}
    adapters.activate(setup)
    inputs = inputs_of("vit")
    expected = outputs(model, inputs, **more)
    twin = copy.deepcopy(model)
    stored = pickle.dumps(model)
    adapters.deactivate()
    close(outputs(twin, inputs, **more), expected)
    close(outputs(pickle.loads(stored), inputs, **more), expected)
    if isinstance(setup, Parallel):
        with torch.no_grad():
            close(outputs(torch.compile(twin, backend="aot_eager"), inputs), expected)


@pytest.mark.parametrize("name", ["gpt2-lm", "t5-lm"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_runs_each_adapter_on_its_rows(name, beams):
    model = tiny(name)
    adapters = inarch.attach(model)
    for number, key in enumerate("ab"):
        adapters.add(key, "seq_bn[reduction_factor=2]|lora[init_weights=bert]")
        for parameter in adapters[key].values():
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.5
    ids = tiny_inputs(name, batch=2)["input_ids"]

    def generated(setup, **more):
        with adapters.using(setup):
            options = {
                "max_new_tokens": 6,
                "min_new_tokens": 6,
                "do_sample": False,
                "num_beams": beams,
                "pad_token_id": 0,
            }
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)

    a, b = generated("a"), generated("b")
    assert not torch.equal(a, b)
    assert torch.equal(generated(Parallel("a", "b")), torch.cat([a, b]))
    assert torch.equal(generated(BatchSplit("b", "a", batch_sizes=1)), torch.stack([b[0], a[1]]))
    assert torch.equal(generated(MultiTask("a", "b"), task_ids=torch.tensor([1, 0])), torch.stack([b[0], a[1]]))
    assert "generate" not in vars(model)
    vars(model)["generate"] = own = type(model).generate.__get__(model)
    assert torch.equal(generated(Parallel("a", "b")), torch.cat([a, b]))
    assert vars(model)["generate"] is own


def test_a_loss_under_parallel_is_the_mean_of_the_losses():
    model, adapters = grafted("bert-classifier", {"a": CONFIGS["a"], "d": CONFIGS["d"]})
    inputs = inputs_of("bert-classifier") | {"labels": torch.tensor([0, 2, 1, 0])}
    losses = []
    for setup in ("a", "d", Parallel("a", "d")):
        with adapters.using(setup):
            losses.append(model(**inputs).loss.item())
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, abs=1e-12)


def test_masks_and_positions_follow_the_copies():
    model, adapters = grafted("bert", {"a": CONFIGS["a"], "d": CONFIGS["d"]})
    ids = inputs_of("bert")["input_ids"]
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5], [6]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(7)[None]}
    alone = [single(model, adapters, inputs, key)["last_hidden_state"] for key in "ad"]
    found = single(model, adapters, inputs, Parallel("a", "d"))["last_hidden_state"]
    assert torch.allclose(found, torch.cat(alone), atol=1e-9)


def test_layers_that_run_again_in_the_backward_pass_know_their_tasks():
    model, adapters = grafted("bert", {"a": "seq_bn", "d": "lora[init_weights=bert]"})
    adapters.train(MultiTask("a", "d"))
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            for layer in model.encoder.layer:
                layer.forward = _again(layer.forward)
        model.zero_grad()
        model.config.hidden_dropout_prob = 0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**inputs_of("bert"), task_ids=torch.tensor([0, 1, 1, 0])).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for key in "ad" for p in adapters[key].values()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-9)
    both = [model(**inputs_of("bert"), task_ids=torch.tensor(ids)) for ids in ([0, 1, 1, 0], [1, 1, 1, 0])]
    with pytest.raises(inarch.SetupError, match="take the tasks of the last forward; got two forwards of other tasks"):
        both[0].last_hidden_state.sum().backward()
    model(**inputs_of("bert"), task_ids=torch.tensor([0, 1, 1, 0])).last_hidden_state.sum().backward()


def _again(forward):
    from torch.utils.checkpoint import checkpoint

    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize(
    ("setup", "more", "message"),
    [
        (BatchSplit("a", "b", batch_sizes=[1, 2]), {}, "make up the batch, 3 samples; got a batch of 4 at BertModel"),
        (BatchSplit("a", "b", batch_sizes=[1, 1]), {}, "make up the batch, 2 samples; got a batch of 4"),
        (
            Split("a", "b", splits=3),
            {},
            r"make up the sequence of every sample, 6 tokens; got a tensor of shape \(4, 7, 32\)",
        ),
        (MultiTask("a", "b"), {}, "needs the task of every sample; got no `task_ids`"),
        (MultiTask("a", "b"), {"task_ids": torch.tensor([0, 1, 2, 0])}, "from 0; got 0 to 2 for MultiTask"),
        (
            MultiTask("a", "b"),
            {"task_ids": torch.tensor([0, 1])},
            r"one whole number for each sample; got shape \(2,\)",
        ),
        (MultiTask("a", "b"), {"task_ids": ["a", "x", "a", "b"]}, "named by the children of a `MultiTask`; got 'x'"),
    ],
)
def test_a_batch_that_does_not_fit_a_setup_is_refused(setup, more, message):
    model, adapters = grafted("bert", dict.fromkeys("ab", "seq_bn"))
    adapters.activate(setup)
    with pytest.raises(inarch.SetupError, match=message):
        model(**inputs_of("bert"), **more)


class Turned(torch.nn.Module):
    """An attention that turns (B, L, D) into (L, B, D) before its projections, as Longformer's does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        turned = x.transpose(0, 1)
        q, k, v = (linear(turned).transpose(0, 1) for linear in (self.q, self.k, self.v))
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v))


class TurnedBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = torch.nn.LayerNorm(8), Turned()

    def forward(self, x):
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize("config", ["lora", "ia3[attn_matrices=[q,k],intermediate_lora=False]"])
def test_a_projection_that_may_hold_samples_elsewhere_is_refused(config):
    model = torch.nn.Sequential(TurnedBlock(), TurnedBlock())
    x = torch.randn(4, 6, 8)
    adapters = inarch.attach(model, example_inputs=x)
    for key, value in {"a": config, "b": config, "c": "lora[attn_matrices=[o]]"}.items():
        adapters.add(key, value)
    adapters.activate(BatchSplit("a", "b", batch_sizes=2))
    with pytest.raises(inarch.SetupError, match=r"got a transposed tensor of shape \(6, 4, 8\) at `\w+.0.self_"):
        model(x)
    adapters.activate(BatchSplit("c", "c", batch_sizes=2))
    model(x)


def test_rows_that_are_not_those_of_samples_are_refused():
    """Images and patches of a model that packs them: whose they are is not known."""
    model, adapters = grafted("clip", dict.fromkeys("ab", "seq_bn"))
    inputs = inputs_of("clip")
    adapters.activate(BatchSplit("a", "b", batch_sizes=2))
    with pytest.raises(inarch.SetupError, match=r"k-th sample; got `pixel_values` of shape \(8, .* for 4 samples"):
        model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    batch = Batch(BatchSplit("a", "b", batch_sizes=1), 2)
    cut = Place("image0.0.mlp", 0, batch).cut(BatchSplit("a", "b", batch_sizes=1))
    _, kwargs = batch.enter(model, (), {"input_ids": torch.zeros(2, 3), "image_sizes": torch.tensor([[4, 4], [8, 2]])})
    assert list(kwargs) == ["input_ids", "image_sizes"]
    assert cut.part(torch.zeros(2, 3, 4), 0).shape == (1, 3, 4)
    with pytest.raises(inarch.SetupError, match=r"shape \(32, 4\).*, where samples may have different numbers of rows"):
        cut.part(torch.zeros(32, 4), 0)
    batch.leave(model, (), None)


def test_a_cut_counts_samples_of_several_rows():
    batch = Batch(BatchSplit("a", "b", batch_sizes=[1, 2]), 3)
    cut = Place("text0.0.self_attention", 0, batch).cut(BatchSplit("a", "b", batch_sizes=[1, 2]))
    assert cut.part(torch.zeros(3, 6, 4), 1).shape == (2, 6, 4)
    assert cut.part(torch.zeros(12, 5, 4), 1).shape == (8, 5, 4)  # four windows for each sample
    assert cut.part(torch.zeros(15, 4), 0).shape == (5, 4)  # tokens in one dimension
    with pytest.raises(inarch.SetupError, match=r"make up the batch; got a tensor of shape \(4, 7, 4\)"):
        cut.part(torch.zeros(4, 7, 4), 0)
    split = BatchSplit(Split("a", "b", splits=[2, 3]), "b", batch_sizes=[1, 2])
    cut = Place("text0.0.self_attention", 0, batch).cut(split)
    assert cut.part(torch.zeros(3, 5, 4), 0).shape == (1, 5, 4)
    message = r"one sequence where a `Split` stands in a block that cuts the batch; got a tensor of shape \(12, 5, 4\)"
    with batch.prepared(Seen(3)), pytest.raises(inarch.SetupError, match=message):
        cut.part(torch.zeros(12, 5, 4), 0)


def test_parts_of_a_model_run_on_inputs_that_are_prepared():
    model, adapters = grafted("clip", {"a": "seq_bn", "d": "lora[init_weights=bert]"})
    pixels = inputs_of("clip")["pixel_values"]
    alone = []
    for key in "ad":
        with adapters.using(key):
            alone.append(model.get_image_features(pixel_values=pixels).pooler_output)
    adapters.activate(Parallel("a", "d"))
    with pytest.raises(
        inarch.SetupError, match=r"copies the batch where the model is called; got a call of a part of CLIP"
    ):
        model.get_image_features(pixel_values=pixels)
    with adapters.prepared():
        found = model.get_image_features(pixel_values=torch.cat([pixels, pixels])).pooler_output
    assert torch.allclose(found, torch.cat(alone), atol=1e-9)
    with pytest.raises(inarch.SetupError, match="got `return_loss=True` at CLIPModel"):
        model(**inputs_of("clip"), return_loss=True)


@pytest.mark.parametrize(
    ("configs", "setup", "message"),
    [
        (
            ["lora[output_lora=True]", "ia3"],
            Average("a", "b"),
            "all change its input or all its output; got both of `a`, `b`",
        ),
        (["seq_bn", "lora"], Stack("a", "c"), "got `c`"),
    ],
)
def test_what_a_block_cannot_mean_is_refused_where_it_is_activated(configs, setup, message):
    _, adapters = grafted("vit", dict(zip("ab", configs, strict=True)))
    with pytest.raises(inarch.SetupError, match=message):
        adapters.activate(setup)


def test_rows_of_a_weight_are_refused_and_averages_of_it_are_not():
    model = (
        torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).double().eval()
    )
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    adapters = inarch.attach(model, example_inputs=x)
    for key in "ab":
        adapters.add(key, "lora[init_weights=bert]")
    with pytest.raises(
        inarch.SetupError, match=r"A weight is one for all rows of a batch; got `lora` of `a` at `\S+` in a `Parallel`"
    ):
        adapters.activate(Parallel("a", "b"))
    adapters.activate("a")
    expected = model(x)
    adapters.activate(Average("a", "a", weights=[1, 3]))
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_a_model_of_the_users_own_is_composed_too():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(5, 4, 32, dtype=torch.float64)  # tokens first
    adapters = inarch.attach(model, example_inputs=x)
    for key in "ab":
        adapters.add(key, "seq_bn")
    alone = {}
    for key in "ab":
        with adapters.using(key):
            alone[key] = model(x)
    adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 3]))
    assert torch.allclose(model(x), torch.cat([alone["a"][:, :1], alone["b"][:, 1:]], dim=1), atol=1e-12)
    adapters.activate(Parallel("a", "b"))
    with pytest.raises(inarch.SetupError, match="along their first dimension; got TransformerEncoder"):
        model(x)
    with adapters.prepared():
        found = model(torch.cat([x, x], dim=1))
    assert torch.allclose(found, torch.cat([alone["a"], alone["b"]], dim=1), atol=1e-12)


def test_a_composition_is_proved_case_by_case():
    _, adapters = grafted("vit", {"a": "seq_bn", "b": "adapter_plus"})
    adapters.add("bad", "bottleneck[original_ln_after=False]", unsound="allow")
    adapters.activate(Stack("a", Parallel("a", "b")))
    report = adapters.check()
    assert report.sound
    assert "case Stack('a', 'b')" in str(report)
    rows = str(adapters.plan(Parallel("b", Stack("a", "b")))).splitlines()
    one, both = "y = x + h + A(x + h)", "y = x + h + A1(x + h) + A2(x + h + A1(x + h))"
    assert [row.endswith(f"  {both}") for row in rows if row.startswith("a ")] == [True, True]
    assert [row.endswith(f"  {one}; {both}") for row in rows if row.startswith("b ")] == [True, True]
    adapters.activate(Average("a", "b", weights=[1, 2]))
    assert "y = x + h + 1/3·A1(x + h) + 2/3·A2(x + h)" in str(adapters.check())
    adapters.activate(Parallel("a", "bad"))
    assert [group.proof.sound for group in adapters.check().sites] == [True, False]
    # Each is sound alone, and one after the other they add the stream twice.
    with pytest.raises(inarch.SetupError, match="skip connection doubled"):
        adapters.activate(BatchSplit("a", Stack("b", "a"), batch_sizes=1))
