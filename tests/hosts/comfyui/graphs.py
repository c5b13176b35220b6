"""Short words for the graphs of the tests, in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

FASTEST, BEST = "difference of means (fastest)", "the model's own predictions (best)"


class Node:
    """A node of a graph: `node[1]` is its second output, the node alone its first."""

    def __init__(self, number: int) -> None:
        self.id = str(number)

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Graph(dict[str, Any]):
    """`graph("KSampler", model=..., seed=1)` adds a node. The dict itself is what POST /prompt takes."""

    def __call__(self, class_type: str, **inputs: Any) -> Node:
        node = Node(len(self) + 1)
        plain = {key: value[0] if isinstance(value, Node) else value for key, value in inputs.items()}
        self[node.id] = {"class_type": class_type, "inputs": {k: v for k, v in plain.items() if v is not None}}
        return node

    def demo(self) -> Node:
        """The embedded model: MODEL, CLIP, VAE."""
        return self("ConceptSteerLoadDemo")

    def prompt(self, demo: Node, text: str) -> Node:
        return self("CLIPTextEncode", clip=demo[1], text=text)

    def vector(self, name: str) -> Node:
        return self("ConceptSteerLoadVector", name=name)

    def steer(self, model: Any, vector: Any, strength: float = 1.0, **more: Any) -> Node:
        """Concept Steer with its neutral settings; `more` changes them."""
        settings = {"start": 0.0, "end": 1.0, "fade": 0.0, "operator": "add", "rows": "prompt", **more}
        return self("ConceptSteer", model=model, vector=vector, strength=strength, **settings)

    def sample(
        self,
        demo: Node,
        model: Any = None,
        positive: Any = None,
        prompt: str = "a doctor",
        steps: int = 6,
        batch: int = 2,
        seed: int = 7,
    ) -> Node:
        """KSampler and VAEDecode: an IMAGE of 128 px."""
        latent = self(
            "KSampler",
            model=demo[0] if model is None else model,
            positive=self.prompt(demo, prompt) if positive is None else positive,
            negative=self.prompt(demo, ""),
            latent_image=self("EmptyLatentImage", width=128, height=128, batch_size=batch),
            seed=seed,
            steps=steps,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        self.sampler = latent
        return self("VAEDecode", samples=latent, vae=demo[2])

    def picture(self, demo: Node, model: Any = None, **more: Any) -> Node:
        """A sampled picture, shown."""
        return self("PreviewImage", images=self.sample(demo, model, **more))

    def learn(self, demo: Node, method: str = FASTEST, preview: bool = False, **more: Any) -> Node:
        """Learn Concept (Prompts): vector, report, before/after."""
        settings = {
            "neutral": "a doctor",
            "positive": "a woman doctor",
            "method": method,
            "steps": 20,
            "examples": 8,
            "vector_seed": 0,
            "title": "",
            "size": 0,
            "spatial": False,
            **more,
        }
        return self(
            "ConceptSteerLearnPrompts",
            model=demo[0],
            clip=demo[1],
            vae=demo[2] if preview else None,
            **settings,
        )

    def save(self, vector: Any, name: str, overwrite: bool = False) -> Node:
        return self("ConceptSteerSaveVector", vector=vector, name=name, overwrite=overwrite)

    def text(self, source: Any) -> Node:
        return self("PreviewAny", source=source)
