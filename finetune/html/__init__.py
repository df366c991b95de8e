"""Builds the HTML pages of the project: one layout, one style sheet, jinja2 templates and SVG pictures.

```python
from finetune.html import render

table = Table(header=["backend", "KL"], rows=[["nf4", "0.02"]])
sections = [Section(title="Size against quality", parts=[table])]
page = render("sections.html", title="Quantization", lead="Measured here.", command="bench", sections=sections)
```
Every value is escaped. `finetune.html.svg` draws, `finetune.html.format` writes numbers for readers.
"""

from finetune.html.render import Figure, Section, Table, render

__all__ = ["Figure", "Section", "Table", "render"]
