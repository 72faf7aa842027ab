"""The jobs."""


def simulate(steps):
    if steps < 0:
        raise ValueError(f"{steps} steps")
    return {"steps": steps}
