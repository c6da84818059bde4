"""What a teacher gets to know of an image: its captions and its boxes (LLaVA section 3, table 1), read from files.

Three kinds of input: COCO's captions_*.json and instances_*.json, of which the miniature world's are a copy in small,
and JSON lines {"id", "image", "captions": [...], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """An image in words.

    id: as the records have it; COCO's numbers with 12 digits.
    image: the file's name below the image folder.
    instances: {"category": name, "bbox": [x1, y1, x2, y2]}, corners divided by width and height of the image.
    """

    id: str
    image: str
    captions: list[str]
    instances: list[dict] = field(default_factory=list)

    def text(self, boxes: bool) -> str:
        """The captions, one on a line; with ``boxes`` an empty line and a line for each of them follow."""
        lines = list(self.captions)
        if boxes and self.instances:
            lines += ["", *(f"{instance['category']}: {instance['bbox']}" for instance in self.instances)]
        return "\n".join(lines)
