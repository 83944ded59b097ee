"""A workflow file out of nodes and wires: what stands where, and the form that ComfyUI's canvas reads.

Values that a node is not given are its own defaults, as a real ComfyUI gives them.
"""

import uuid
from collections.abc import Sequence

import dev

from .setup import ROOT

NOTES = ROOT / "lab" / "notes"
GAP, PAD, HEAD = 50, 24, 50  # pixels: between nodes, around them in a group, of a group's title
TITLE = 40  # pixels, of a node's title, which is no part of its size
WIDTHS = {"ZTurboTrainLoRA": 440, "ZTurboCompare": 420, "SaveImage": 520, "MarkdownNote": 460, "LoraModelLoader": 300}
# pixels beside sockets and widgets: the panel, a sheet of pictures
MORE = {
    "ZTurboTrainLoRA": 640,
    "ZTurboCompare": 380,
    "SaveImage": 400,
    "ZTurboImageDataset": 300,
    "ZTurboCheckAdapter": 260,
    "ZTurboSaveLoRA": 40,
}
COLOUR = "#3f789e"
HUB = "https://huggingface.co"
PARTS = f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
DOWNLOADS = {
    "z_image_turbo_bf16.safetensors": ("diffusion_models", f"{PARTS}/diffusion_models"),
    "qwen_3_4b.safetensors": ("text_encoders", f"{PARTS}/text_encoders"),
    "ae.safetensors": ("vae", f"{PARTS}/vae"),
    "zimage_turbo_training_adapter_v2.safetensors": (
        "loras",
        f"{HUB}/ostris/zimage_turbo_training_adapter/resolve/main",
    ),
    "z_image_de_turbo_v1_bf16.safetensors": ("diffusion_models", f"{HUB}/ostris/Z-Image-De-Turbo/resolve/main"),
}


class Node:
    """One node of a graph; `node["model"]` is its output of that name."""

    def __init__(self, graph: "Graph", kind: str, title: str, values: dict):
        self.graph, self.kind, self.title, self.values = graph, kind, title, values
        self.number = len(graph.nodes) + 1
        self.mode, self.pos = 0, (0.0, 0.0)
        self.labels: dict[str, str] = {}  # of inputs that are shown under another name
        self.quiet: list[str] = []  # notices of js/notices.js that are not shown at it
        self.info = graph.info.get(kind)
        graph.nodes.append(self)

    def __getitem__(self, output: str) -> tuple["Node", int]:
        return self, self.info["output_name"].index(output)

    def fields(self) -> dict[str, list]:
        """Inputs by name, as the server describes them."""
        return {**self.info["input"].get("required", {}), **self.info["input"].get("optional", {})} if self.info else {}

    def widgets(self) -> dict[str, list]:
        return {name: spec for name, spec in self.fields().items() if dev.is_widget(spec)}

    @property
    def size(self) -> tuple[int, int]:
        """Pixels that hold it in both ways to draw nodes."""
        if self.kind == "MarkdownNote":
            return self.graph.note_size
        widgets = self.widgets()
        tall = sum(bool(spec[1].get("multiline")) for spec in widgets.values() if len(spec) > 1)
        shown = sum(not (len(spec) > 1 and spec[1].get("advanced")) for spec in widgets.values())
        sockets = max(len(self.fields()) - len(widgets), len(self.info["output"]))
        classic = 20 * sockets + 24 * len(widgets) + 60 * tall
        modern = 24 * sockets + 34 * shown + 70 * tall + 40
        return WIDTHS.get(self.kind, 380), max(classic, modern) + 20 + MORE.get(self.kind, 0)

    def value(self, name: str, spec: list):
        if name in self.values and not isinstance(self.values[name], tuple):
            return self.values[name]
        options = spec[1] if len(spec) > 1 else {}
        choices = spec[0] if isinstance(spec[0], list) else options.get("options") or [""]
        return options.get("default", choices[0] if spec[0] == "COMBO" or isinstance(spec[0], list) else "")

    def stored(self) -> list:
        """Its widgets' values in the order of workflow files."""
        if self.kind == "MarkdownNote":
            return [self.values["text"]]
        found = []
        for name, spec in self.widgets().items():
            found.append(self.value(name, spec))
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                found.append("fixed")
        return found


class Graph:
    """A workflow. info: what the server says of all nodes."""

    def __init__(self, info: dict, name: str, note_size: tuple[int, int] = (460, 620)):
        self.info, self.name, self.note_size = info, name, note_size
        self.nodes: list[Node] = []
        self.groups: list[dict] = []
        self.extra: dict = {}
        self.note = self.add("MarkdownNote", "Read me", text=words(f"{name}.md"))

    def add(self, kind: str, title: str = "", **values) -> Node:
        """values: of widgets by name, and outputs of other nodes."""
        return Node(self, kind, title, values)

    def lay_out(self, *stages: Sequence[tuple[str, Sequence[Sequence[Node]]]]):
        """stages, from left to right, each of groups from top to bottom: (title, columns of nodes)."""
        self.note.pos = (0, HEAD)
        x = self.note_size[0] + 2 * GAP
        for stage in stages:
            y, wide = 0, 0
            for title, columns in stage:
                width, height = self._group(x, y, title, columns)
                wide, y = max(wide, width), y + height + GAP
            x += wide + GAP

    def _group(self, x: int, y: int, title: str, columns: Sequence[Sequence[Node]]) -> tuple[int, int]:
        """Place a group; gives its size."""
        left, low = x + PAD, 0
        for column in columns:
            top = y + HEAD + TITLE
            for node in column:
                node.pos = (left, top)
                top += node.size[1] + TITLE + 20
            low = max(low, top - TITLE - 20)
            left += max(node.size[0] for node in column) + GAP
        width, height = left - GAP + PAD - x, low + PAD - y
        box = {"id": len(self.groups) + 1, "title": title, "bounding": [x, y, width, height]}
        self.groups.append({**box, "color": COLOUR, "font_size": 24, "flags": {}})
        return width, height

    def to_json(self) -> dict:
        links: list[list] = []
        nodes = [self._node(node, order) for order, node in enumerate(self.nodes)]
        by_number = {node["id"]: node for node in nodes}
        for node in self.nodes:
            for slot in by_number[node.number]["inputs"]:
                wire = node.values.get(slot["name"])
                if isinstance(wire, tuple):
                    source, output = wire
                    slot["link"] = len(links) + 1
                    place = by_number[node.number]["inputs"].index(slot)
                    kind = source.info["output"][output]
                    links.append([slot["link"], source.number, output, node.number, place, kind])
                    by_number[source.number]["outputs"][output]["links"].append(slot["link"])
        about = {"id": f"zturbo-{self.name}", "revision": 0, "last_node_id": len(nodes), "last_link_id": len(links)}
        rest = {"groups": self.groups, "config": {}, "extra": self.extra, "version": 0.4}
        return {**about, "nodes": nodes, "links": links, **rest}

    def _node(self, node: Node, order: int) -> dict:
        fields, widgets = node.fields(), node.widgets()
        optional = (node.info or {}).get("input", {}).get("optional", {})
        inputs = []
        for name, spec in fields.items():
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            slot = {"name": name, "type": kind, "link": None}
            slot |= {"widget": {"name": name}} if name in widgets else {"shape": 7} if name in optional else {}
            slot |= {"label": node.labels[name]} if name in node.labels else {}
            inputs.append(slot)
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip((node.info or {}).get("output_name", []), (node.info or {}).get("output", []))
        ]
        properties: dict = {} if node.info is None else {"Node name for S&R": node.kind}
        properties |= {"zturbo_quiet": node.quiet} if node.quiet else {}
        values = node.stored()
        if files := [value for value in values if isinstance(value, str) and value in DOWNLOADS]:
            properties["models"] = [
                {"name": file, "url": f"{DOWNLOADS[file][1]}/{file}", "directory": DOWNLOADS[file][0]} for file in files
            ]
        made = {
            "id": node.number, "type": node.kind, "pos": list(node.pos), "size": list(node.size), "flags": {},
            "order": order, "mode": node.mode, "inputs": inputs, "outputs": outputs, "properties": properties,
            "widgets_values": values,
        }  # fmt: skip
        colours = {} if node.info else {"color": "#432", "bgcolor": "#653"}
        return made | colours | ({"title": node.title} if node.title else {})

    def to_subgraph(self, title: str, asked: dict[Node, dict[str, list[Node]]], given: dict[str, tuple]) -> dict:
        """As a blueprint of one node.

        asked: of a node, {name of its widget: other nodes that take the same text}; given: outputs by their names.
        """
        inside = self.to_json()
        nodes = {node["id"]: node for node in inside["nodes"]}
        links = [_link(*link) for link in inside["links"]]
        inputs, shown, values, outputs = [], [], [], []
        for node, widgets in asked.items():
            for name, others in widgets.items():
                ids = []
                for one in (node, *others):
                    slot = next(slot for slot in nodes[one.number]["inputs"] if slot["name"] == name)
                    slot["link"] = len(links) + 1
                    ids.append(slot["link"])
                    place = nodes[one.number]["inputs"].index(slot)
                    links.append(_link(slot["link"], -10, len(inputs), one.number, place, slot["type"]))
                about = {"name": name, "type": slot["type"]}
                inputs.append({"id": key(self.name, name), **about, "linkIds": ids, "pos": [-40, 20 * len(inputs)]})
                shown.append({**about, "widget": {"name": name}, "link": None})
                values.append(node.value(name, node.fields()[name]))
        for name, (node, slot) in given.items():
            kind, ids = node.info["output"][slot], [len(links) + 1]
            links.append(_link(*ids, node.number, slot, -20, len(outputs), kind))
            nodes[node.number]["outputs"][slot]["links"] += ids
            place = {"pos": [3000, 20 * len(outputs)]}
            outputs.append({"id": key(self.name, name), "name": name, "type": kind, "linkIds": ids, **place})
        counts = {"lastGroupId": len(self.groups), "lastNodeId": len(nodes), "lastLinkId": len(links)}
        definition = {
            "id": key(self.name), "version": 1, "state": {**counts, "lastRerouteId": 0}, "revision": 0, "config": {},
            "name": title, "inputNode": {"id": -10, "bounding": [-160, 0, 120, 160]},
            "outputNode": {"id": -20, "bounding": [3000, 0, 120, 160]}, "inputs": inputs, "outputs": outputs,
            "widgets": [], "nodes": inside["nodes"], "groups": self.groups, "links": links, "extra": {},
            "category": "Z-Image Turbo", "description": words(f"{self.name}.md"),
        }  # fmt: skip
        out = [{"name": one["name"], "type": one["type"], "links": None} for one in outputs]
        number = len(nodes) + 1
        outer = {
            "id": number, "type": key(self.name), "pos": [0, 0], "size": [440, 420], "flags": {}, "order": 0, "mode": 0,
            "inputs": shown, "outputs": out, "widgets_values": values,
            "properties": {"proxyWidgets": [["-1", one["name"]] for one in shown]},
        }  # fmt: skip
        about = {"id": key(self.name, "workflow"), "revision": 0, "last_node_id": number, "last_link_id": len(links)}
        rest = {"definitions": {"subgraphs": [definition]}, "config": {}, "extra": {}, "version": 0.4}
        return {**about, "nodes": [outer], "links": [], "groups": [], **rest}


def _link(number: int, source: int, output: int, target: int, place: int, kind: str) -> dict:
    """A wire as it is written inside a subgraph."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return dict(zip(names, (number, source, output, target, place, kind)))


def key(*names: str) -> str:
    """A UUID that is always the same for the same names."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("zimage-turbo-lora", *names))))


def words(file: str) -> str:
    return (NOTES / file).read_text(encoding="utf-8").rstrip()
