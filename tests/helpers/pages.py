"""What holds for every report."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A parsed page: `text` outside of tags, and the attributes of its `images` and `links`.

    Raises:
        AssertionError: A tag is closed that is not the open one, or left open.
    """

    def __init__(self, document: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.images, self.links = "", [], []
        self.feed(document)
        assert self.open == [], f"left open: {self.open}"
        assert all(image["src"].startswith("data:image/") for image in self.images)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_startendtag(self, tag, attrs):
        pass  # shapes of an SVG

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data
