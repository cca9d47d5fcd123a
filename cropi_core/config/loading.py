"""Load configuration files: YAML and overrides become a validated configuration; all faults are reported at once.

    config = load_config("demo", ["selection.ratio=0.2", "stages=1"])

Relative paths inside a configuration are relative to the current directory, not to the configuration file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from cropi_core.config.faults import Fault, Location, describe, near, refuse, show
from cropi_core.errors import ConfigError, foreign_errors
from data_schemas import Config, Data, Section, Source

PRESETS = (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs")
"""Preset directories of a checkout and of an installed package."""
MOST_YAML = 1 << 20
"""Maximum bytes of a configuration file."""
MOST_VALUES = 100_000
"""Maximum keys, lists and scalars of a configuration with aliases expanded; the longest preset has about 100."""


def load_config(path_or_preset: str, overrides: list[str] | None = None) -> Config:
    """Read a configuration.

    Args:
        path_or_preset: A YAML file, or the name of a file of ``configs/``.
        overrides: Overrides of the form ``a.b.c=value``; the value is YAML, the last one wins.

    Raises:
        ConfigError: The file does not exist or is not YAML, or settings are unknown, invalid or contradictory; each
            fault is one line with its path, value and reason.
    """
    path = find_config(path_or_preset)
    data = read_yaml(path)
    faults = [fault for text in overrides or [] if (fault := apply_override(data, text)) is not None]
    config, more = validated(data)
    if config is None or faults:
        refuse(str(path), faults + more)
    return config


def load_sections(sections: Mapping[str, type[Section]], overrides: list[str]) -> dict[str, Any]:
    """Build the named sections from their defaults and overrides such as ``projection.kind=none``.

    Raises:
        ConfigError: An override is malformed, names no field of these sections, or has an invalid value.
    """
    data: dict[str, Any] = {}
    faults = [fault for text in overrides if (fault := apply_override(data, text)) is not None]
    built: dict[str, Any] = {}
    for name in sorted(set(data) - set(sections)):
        guess = near(name, list(sections))
        faults.append((name, f"no section of this step{guess or '; there are ' + ', '.join(sections)}"))
    for name, model in sections.items():
        try:
            built[name] = model.model_validate(data.get(name, {}))
        except ValidationError as error:
            faults += [describe(model, dict(item), prefix=name) for item in error.errors()]
    if faults:
        refuse("these options", faults)
    return built


def find_config(path_or_preset: str, folder: str = "") -> Path:
    """Find a configuration file, first by path, then by the name of a preset.

    Args:
        path_or_preset: A path or a preset's name.
        folder: Subdirectory of ``configs/`` with the presets.

    Raises:
        ConfigError: It is neither; the message lists the presets and suggests the closest one.
    """
    path = Path(path_or_preset).expanduser()
    if path.is_file():
        return path
    names: dict[str, Path] = {}
    for directory in reversed(PRESETS):
        names |= {p.stem: p for p in sorted((directory / folder).glob("*.yaml"))}
    if path_or_preset in names:
        return names[path_or_preset]
    presets = ", ".join(sorted(names)) or "none"
    raise ConfigError(
        f"{path_or_preset!r} is neither a file (from {Path.cwd()}) nor a preset"
        f"{near(path_or_preset, list(names))}; presets: {presets}"
    )


# -- reading ---------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys, where YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            text = f"{key.tag} {key.value}"
            if text in keys and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} twice", key.start_mark
                )
            keys.add(text)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse untrusted YAML; limit what aliases expand to.

    341 bytes of nested aliases can expand to billions of values, which block any code that iterates over them.

    Raises:
        yaml.YAMLError: It is not YAML, nests too deeply, or has more than ``MOST_VALUES`` values.
        ValueError, OverflowError: A date or a number has a value that Python cannot represent.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {}, ())
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("it nests too deeply") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Count the values below a node with all aliases expanded."""
    if id(node) in above:
        raise yaml.YAMLError(f"an alias holds itself{node.start_mark}")
    if id(node) not in counted:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        counted[id(node)] = 1 + sum(_count(one, counted, (*above, id(node))) for one in inner)
    if counted[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values once its aliases are written out")
    return counted[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without duplicate keys.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping; the message gives the line.
    """
    with foreign_errors(f"{path} cannot be read as YAML", ConfigError):
        data = parse_yaml(_text(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, a configuration is a mapping of sections")
    return data


def _text(path: Path) -> str:
    with path.open("rb") as stream:
        data = stream.read(MOST_YAML + 1)
    if len(data) > MOST_YAML:
        raise OSError(f"it has more than {MOST_YAML >> 20} MB")
    return data.decode("utf-8")


def apply_override(data: dict[str, Any], text: str) -> Fault | None:
    """Apply one ``a.b.c=value`` in place; return a fault if it is malformed."""
    name, equals, raw = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        return text, "an override is written section.field=value"
    try:
        with foreign_errors("the value is not YAML", ConfigError):
            value = parse_yaml(raw)
    except ConfigError as error:
        return text, str(error)
    node = data
    for depth, part in enumerate(parts[:-1], 1):
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            return name, f"{'.'.join(parts[:depth])} is {show(node[part])}, it has no fields"
        node = node[part]
    node[parts[-1]] = value
    return None


# -- checking --------------------------------------------------------------------------------------------


def validated(data: dict[str, Any]) -> tuple[Config | None, list[Fault]]:
    """Validate a configuration; return the faults of its fields and the contradictions between them."""
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
    faults = [describe(Config, item) for item in items if item["loc"]]
    remainder = _without(data, [_steps_in(data, item["loc"]) for item in items if item["loc"]])
    return None, faults + [("", text) for text in _contradictions(remainder, data.get("data"))]


def _contradictions(sections: dict[str, Any], sets: Any) -> list[str]:
    """List the contradictions in a configuration without its faulty fields; absent sections have their defaults."""
    built: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name == "data":
            built[name] = _data_names(sets)
            continue
        built[name] = field.get_default(call_default_factory=True)
        model = field.annotation
        if name in sections and isinstance(model, type) and issubclass(model, Section):
            try:
                built[name] = model.model_validate(sections[name])
            except ValidationError:
                continue  # a fault that removing fields does not correct; it is reported already
    return Config.model_construct(**built).contradictions()


def _data_names(data: Any) -> Data:
    """Keep the names of the sets and the sources that are valid by themselves, which the contradictions refer to."""
    parts = data if isinstance(data, dict) else {}
    validation, test = (
        {name: _source(raw) for name, raw in v.items()} if isinstance(v := parts.get(part), dict) else {}
        for part in ("validation", "test")
    )
    return Data.model_construct(pool=_source(parts.get("pool")), validation=validation, test=test)


def _source(raw: Any) -> Any:
    try:
        return TypeAdapter(Source).validate_python(raw)
    except ValidationError:
        return None  # its own faults are reported already


def _steps_in(data: Any, location: Location) -> Location:
    """Turn a location of pydantic into the path in the file: without union tags and key marks."""
    steps: list[int | str] = []
    node = data
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if part == "[key]" or (
            isinstance(node, dict) and node.get("kind") == part and not (last and part in node)
        ):
            continue
        steps.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    return tuple(steps)


def _without(data: dict[str, Any], paths: list[Location]) -> dict[str, Any]:
    copy = json.loads(json.dumps(data, default=str))
    for path in paths:
        node = copy
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(path[-1], None)
    return copy
