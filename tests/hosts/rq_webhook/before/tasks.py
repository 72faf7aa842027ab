"""The jobs."""


def make_report(runid, pages=1):
    if pages < 1:
        raise ValueError(f"a report of {pages} pages")
    return {"runid": runid, "pages": pages}
