"""YAML as a configuration needs it: text, numbers, lists and mappings, each key once, of a bearable size."""

from collections.abc import Iterator
from typing import Any

import yaml

from nestune.errors import SHOWN_FAULTS

# A hundred times what the longest configuration holds.
MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_DIGITS = 60
TAG = "tag:yaml.org,2002:"
KINDS = ("str", "int", "float", "bool", "null")
TEXT, MERGE = f"{TAG}str", f"{TAG}merge"


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with every fault and its line, and what to write instead."""
    try:
        loader = _KeysOnce(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        faults = list(_faults(node, loader))
        if faults:
            more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
            raise ValueError("; ".join([*faults[:SHOWN_FAULTS], *more]))
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (yaml.YAMLError, OverflowError) as error:  # the latter from an escape such as \UFFFFFFFF
        raise ValueError(f"{error!s:.1000}") from None


class _KeysOnce(yaml.SafeLoader):
    """YAML in which a key given twice in one mapping is an error; YAML's own rule is that the last wins."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value:.80} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _measure(root: yaml.Node) -> None:
    """Raise ValueError when the text stands for more than `MAX_NODES` values, aliases written out, or nests too deeply.

    An alias of an alias of an alias can stand for more than fits into any memory, and one within what it names for
    something endless; neither shows before it is written out.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ValueError(f"an alias in line {node.start_mark.line + 1} stands within what it names; write it out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
            sizes[id(node)] = 1 + sum(map(size, _parts(node)))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    values = size(root)
    if values > MAX_NODES:
        seen = values if values < 10**12 else "very many"
        raise ValueError(f"it stands for {seen} values, aliases written out; at most {MAX_NODES} are read")


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _faults(root: yaml.Node, loader: yaml.SafeLoader) -> Iterator[str]:
    """What is no text, number, list or mapping, with its line; a node that has several aliases is looked at once."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        line = f"line {node.start_mark.line + 1}: "
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if key.tag not in (TEXT, MERGE):
                    shown = f"{key.value!r:.40}" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                    yield f"line {key.start_mark.line + 1}: a key that is no text, {shown}; put it in quotes"
            merged = {id(key) for key, _ in node.value if key.tag == MERGE}
            waiting += [part for part in _parts(node) if id(part) not in merged]
            expected = f"{TAG}map"
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
            expected = f"{TAG}seq"
        else:
            fault = _fault_of_scalar(node, loader)
            if fault is not None:
                yield line + fault
            continue
        if node.tag != expected:
            yield f"{line}{node.tag:.60} is not read; write a list or a mapping"


def _fault_of_scalar(node: yaml.Node, loader: yaml.SafeLoader) -> str | None:
    value = str(node.value)
    if node.tag == TEXT:
        if "\0" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            return f"{value!a:.60} holds a character that no file can; remove it"
        return None
    # As YAML itself would understand it: of another tag, written before it, nobody knows what it would become.
    understood = loader.resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
    if node.tag not in [f"{TAG}{kind}" for kind in KINDS] or understood != node.tag:
        return f"{value!r:.60} is read as {node.tag.removeprefix(TAG):.60}; put it in quotes"
    if len(value) > MAX_DIGITS and node.tag in (f"{TAG}int", f"{TAG}float"):
        return f"a number of {len(value)} characters; at most {MAX_DIGITS} are read"
    return None
