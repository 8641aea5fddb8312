"""What is known of a model's residual branches, as plain data: the records that everything else reads.

    Tap         one place where a tensor can be read or replaced: a side of a module, and which of its values
    Projection  one linear map inside a branch, or some output features of a fused one
    Affine      the vectors of a norm or of a projection: a weight, a bias, or both
    Site        one residual branch of one layer
    Entry       where one stack of layers gets its tokens from
    Sites       all of them, with where the knowledge comes from

No torch here: a `Sites` can be printed, stored as JSON, compared and shipped.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import SiteError, join_problems, nearest

Kind = Literal["self_attention", "cross_attention", "mlp", "mixer"]
KINDS: tuple[Kind, ...] = ("self_attention", "cross_attention", "mlp", "mixer")

Arrangement = Literal["pre", "post", "sandwich", "branch", "none"]
"""Where the layer normalises: before the branch, after the sum, before the branch and on its output, only on its
output, or not at all."""
ARRANGEMENTS: tuple[Arrangement, ...] = ("pre", "post", "sandwich", "branch", "none")

LAYOUT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A tensor at the boundary of a module.

    `path` is relative to the layer ("" is the layer itself). `key` is the way into the call's arguments (a position or
    a keyword) or into its result: () for a result that is the tensor itself, (0,) for the first item of a tuple.
    Where the module is called several times in one call of the layer, `call` is the number of the call that is meant,
    from 1, and `since` another module of the layer, or the layer: one that is called once, before the first of them.
    """

    path: str
    side: Literal["in", "out"]
    key: tuple[int | str, ...] = ()
    call: int = 0
    since: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A linear map `y = W x + b` inside a branch; `path` is relative to the layer.

    `weight` is empty where `path` is a linear module that is called. Where some other module applies the matrix itself,
    `path` is that module and `weight` names the parameter in it: `in_proj_weight` or `out_proj.weight` of torch's
    `nn.MultiheadAttention`. There the input and the output of the map cannot be seen; its weight can be replaced.

    `rows` are the output features that play the role, as half-open ranges, for a projection that computes several roles
    at once (fused q, k, v); None means all of them. `transposed` marks weights stored as (in, out).
    """

    path: str
    in_features: int
    out_features: int
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    weight: str = ""
    experts: int = 0
    """Where the parameter holds one matrix for each of several experts, how many: (E, out, in)."""

    @property
    def num_rows(self) -> int:
        """How many output features play the role."""
        return self.out_features if self.rows is None else sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Affine:
    """The vectors that a module applies to features: the weight and the bias of a norm, or the bias of a projection.

    `path` is the module that reads them, for `Site.absolute`; `weight` and `bias` are their names in it, empty for what
    there is none of. Each has `size` numbers that play the role: all of them, or those of `rows`.
    """

    path: str
    size: int
    weight: str = ""
    bias: str = ""
    rows: tuple[tuple[int, int], ...] | None = None
    is_norm: bool = False
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies by it."""

    @property
    def names(self) -> dict[str, str]:
        """The vectors there are: what each is, and its name in the module."""
        return {leaf: name for leaf, name in (("weight", self.weight), ("bias", self.bias)) if name}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One residual branch: the stream `x` enters, the branch gives `h`, and the layer adds them.

    `stack` names the tower by modality and ordinal ("image0"), `layer` counts its layers, `role` is the kind, numbered
    from the second of its kind in a layer ("mlp_2"): together they are the site's key, which survives a renaming of
    modules in the host library. `layer_path` is the layer's place in this model; all other paths are relative to it.
    """

    stack: str
    layer: int
    role: str
    kind: Kind
    layer_path: str
    layer_class: str
    width: int
    arrangement: Arrangement
    output: Tap
    """Where `h` appears, as close to the sum as a module boundary allows."""
    stream: Tap | None = None
    """Where `x` can be read before `h` is there; None where no module of the layer sees it."""
    pre_norm: str | None = None
    post_norm: str | None = None
    branch_norm: str | None = None
    same_layout: bool = True
    """Whether `x` and `h` have the same shape, token by token (not so for window partitions)."""
    exact: bool = True
    """Whether `output` is the very operand of the sum; False where a scale or a gate follows it."""
    dropped_later: bool = False
    """Whether the layer calls `dropout` on `output` before it adds it: in training, adapters act after that."""
    shared_sum: bool = False
    """Whether other branches of the layer are added in the same sum (parallel attention and MLP)."""
    handed_on: bool = True
    """Whether the next site of the layer takes up this sum as it is, but for reshaping; False where it takes up another
    stream, or the layer changes the sum in between."""
    batch_dim: int = 0
    """The dimension of `x` and `h` that tells samples apart: 0 in (B, L, D), 1 in (L, B, D)."""
    feature_dim: int = -1
    """The dimension of `h` that holds its features: the last, or 1 in feature maps (B, D, H, W)."""
    projections: Mapping[str, tuple[Projection, ...]] = dataclasses.field(default_factory=dict)
    """By role: q, k, v, o of an attention; up, gate, down of an MLP; expert_up, expert_down of its experts."""
    notes: tuple[str, ...] = ()
    affine: Mapping[str, Affine] = dataclasses.field(default_factory=dict, compare=False)
    """The vectors of norms and projections, by role: those of projections by theirs, `pre_norm`, `post_norm` and
    `branch_norm`, and numbered from the second, `inner_norm` for other norms of the branch and, at the first site of a
    stack, `outer_norm` for norms outside the layers. Read off a model, so no part of a layout."""

    @property
    def key(self) -> str:
        """`{stack}.{layer}.{role}`, such as `image0.3.mlp`."""
        return f"{self.stack}.{self.layer}.{self.role}"

    def absolute(self, path: str) -> str:
        """A path inside the layer, from the root of the model; one that begins with `/` is from there already."""
        if path.startswith("/"):
            return path[1:]
        return ".".join(part for part in (self.layer_path, path) if part)

    def signature(self) -> tuple[Any, ...]:
        """All that equal sites of different layers share: everything but the layer's place, in hashable form."""
        return tuple(
            tuple(sorted((k, v) for k, v in value.items())) if isinstance(value, Mapping) else value
            for field in dataclasses.fields(self)
            if field.name not in ("layer", "layer_path", "affine")
            for value in (getattr(self, field.name),)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Where one stack of layers gets its tokens from. All paths are absolute.

    `caller` is the module that is called with the tokens, `runner` the one that runs the layers: the same, or a part
    of it. `words` embeds token ids; `embedding` is the module whose result is the embedded sequence, None where
    nothing but the first layer sees it; `width` is the width of that sequence. `fan_in` counts the numbers of which
    one token is made: pixels of a patch, or `width` where that is not known.
    """

    caller: str | None
    runner: str
    words: str | None
    embedding: str | None
    width: int
    fan_in: int
    words_width: int = 0
    """Of what the table of words gives; narrower than `width` where the embedding widens it."""
    gives_positions: bool = False
    """Whether `embedding` has a table besides that of words, so that its tokens have their positions."""
    takes_embeddings: bool = False
    """Whether the caller takes `inputs_embeds` in the place of `input_ids`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sites:
    """The residual sites of one model, in the order in which they run."""

    sites: tuple[Site, ...]
    model_class: str
    model_type: str = ""
    source: Literal["layout", "golden", "meta", "forward"] = "meta"
    """Where the knowledge comes from: the user's layout, a shipped one, a probe without weights, or a real forward."""
    refused: tuple[str, ...] = ()
    """What looks like a residual branch but cannot be adapted, each with its reason."""
    entries: Mapping[str, Entry] = dataclasses.field(default_factory=dict, compare=False)
    """By stack. Read off the model whatever the source of the sites is, so no layout holds them."""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, key: str) -> Site:
        for site in self.sites:
            if site.key == key:
                return site
        raise SiteError(f"`{key}` is not a site of {self.model_class}. {nearest(key, [s.key for s in self.sites])}")

    @property
    def num_layers(self) -> dict[str, int]:
        """Layers by stack."""
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[site.stack] = max(counts.get(site.stack, 0), site.layer + 1)
        return counts

    def groups(self) -> list[list[Site]]:
        """Sites that differ only by their layer, together; in the order of their first appearance."""
        found: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.signature(), []).append(site)
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """A layout: JSON data that `from_dict` and `inarch.attach(layout=...)` read."""
        rows = []
        for group in self.groups():
            row = {k: v for k, v in dataclasses.asdict(group[0]).items() if k not in ("layer", "layer_path", "affine")}
            for part in (part for parts in row["projections"].values() for part in parts):
                if not part["experts"]:
                    del part["experts"]
            row["layers"] = {str(site.layer): site.layer_path for site in group}
            rows.append(row)
        return {
            "format": LAYOUT_VERSION,
            "model_class": self.model_class,
            "model_type": self.model_type,
            "sites": json.loads(json.dumps(rows)),
            "order": [site.key for site in self.sites],
            "refused": list(self.refused),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Sites":
        """The sites a layout describes. Raises `SiteError` that names every malformed row."""
        if data.get("format") != LAYOUT_VERSION:
            raise SiteError(
                f"A layout has `format` {LAYOUT_VERSION}; got {data.get('format')!r}. "
                "Make one with `inarch.probe(model).to_dict()`."
            )
        sites: list[Site] = []
        problems: list[str] = []
        for number, row in enumerate(data.get("sites", ())):
            try:
                sites += _sites_of_row(dict(row))
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                problems.append(f"a row of a layout describes one kind of site; row {number} does not: {error}")
        if problems:
            raise SiteError(join_problems(problems) + " Compare with `inarch.probe(model).to_dict()`.")
        order = {key: place for place, key in enumerate(data.get("order", ()))}
        sites.sort(key=lambda site: order.get(site.key, len(order)))
        return cls(
            sites=tuple(sites),
            model_class=str(data.get("model_class", "")),
            model_type=str(data.get("model_type", "")),
            source="layout",
            refused=tuple(data.get("refused", ())),
        )


def _tap(data: Mapping[str, Any] | None) -> Tap | None:
    if data is None:
        return None
    call, since = int(data.get("call", 0)), data.get("since")
    if (call > 0) != isinstance(since, str):
        raise ValueError(f"`call` and `since` go together; got {call} and {since!r}")
    return Tap(path=data["path"], side=data["side"], key=tuple(data["key"]), call=call, since=since)


def _projection(data: Mapping[str, Any]) -> Projection:
    rows = data.get("rows")
    fields = {**data, "rows": None if rows is None else tuple((int(a), int(b)) for a, b in rows)}
    return Projection(**fields)


def _sites_of_row(row: dict[str, Any]) -> list[Site]:
    layers = row.pop("layers")
    output = _tap(row["output"])
    if output is None:
        raise ValueError("`output` is required")
    if row["kind"] not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}; got {row['kind']!r}")
    if row["arrangement"] not in ARRANGEMENTS:
        raise ValueError(f"`arrangement` must be one of {', '.join(ARRANGEMENTS)}; got {row['arrangement']!r}")
    if row.get("batch_dim", 0) not in (0, 1):
        raise ValueError(f"`batch_dim` must be 0 or 1; got {row['batch_dim']!r}")
    if row.get("feature_dim", -1) not in (-1, 1):
        raise ValueError(f"`feature_dim` must be -1 or 1; got {row['feature_dim']!r}")
    row |= {
        "output": output,
        "stream": _tap(row.get("stream")),
        "projections": {
            role: tuple(_projection(part) for part in parts) for role, parts in row.get("projections", {}).items()
        },
        "notes": tuple(row.get("notes", ())),
    }
    return [Site(layer=int(layer), layer_path=path, **row) for layer, path in layers.items()]
