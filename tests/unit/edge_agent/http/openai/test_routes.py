from __future__ import annotations

from tests.unit.edge_agent.http.openai.api import assert_error, client
from tests.unit.edge_agent.language.scripted import ScriptedBackend


def test_models_are_listed_and_described() -> None:
    listed = client(ScriptedBackend()).get("/v1/models").json()
    assert listed["object"] == "list"
    names = [entry["id"] for entry in listed["data"]]
    assert {"tiny", "auto", "edge", "cloud", "verify", "tiny:edge"} <= set(names)
    for entry in listed["data"]:
        assert client(ScriptedBackend()).get(f"/v1/models/{entry['id']}").json()["id"] == entry["id"]
    assert_error(client(ScriptedBackend(cloud=False)).get("/v1/models/cloud"), 404, code="model_not_found")
    named = ScriptedBackend(name="lab/tiny")
    assert client(named).get("/v1/models/lab/tiny:edge").json()["id"] == "lab/tiny:edge"
