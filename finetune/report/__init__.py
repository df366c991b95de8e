"""Writes a run on one page: report.json for programs, report.md for a terminal, report.html for people.

```python
from finetune.report import report

files = report(Path("outputs/quickstart"))  # from whatever stages have finished
print(files.html, files.status)
```
"""

from finetune.report.stage import ReportFiles, report

__all__ = ["ReportFiles", "report"]
