"""The role: every verb that a call may use, nothing twice, no Secret listed or watched, no finalizers."""

from __future__ import annotations

from ensemble_operator.control.kinds import KINDS, OPTIONAL, WATCHED
from ensemble_operator.control.rbac import own_rules, rules


def allowed(*, cluster_wide: bool = True) -> set[tuple[str, str, str]]:
    found = [
        (group, resource, verb)
        for rule in rules(cluster_wide=cluster_wide) + own_rules()
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]
    assert len(found) == len(set(found)), "a rule is there twice"
    return set(found)


def test_every_watched_kind_may_be_listed_and_watched() -> None:
    for kind in WATCHED:
        assert {(kind.group, kind.plural, "list"), (kind.group, kind.plural, "watch")} <= allowed()


def test_secrets_are_read_by_name_only() -> None:
    assert {verb for _, resource, verb in allowed() if resource == "secrets"} == {"get", "create", "delete"}


def test_no_wildcards_and_no_finalizers_and_known_kinds_only() -> None:
    plurals = {kind.plural for kind in KINDS}
    for group, resource, verb in allowed():
        assert "*" not in group + resource + verb
        assert not resource.endswith("/finalizers")
        assert resource.split("/")[0] in plurals
    assert OPTIONAL


def test_one_namespace_needs_nothing_of_the_cluster() -> None:
    narrow = allowed(cluster_wide=False)
    assert narrow < allowed()
    cluster_scoped = {kind.plural for kind in KINDS if not kind.namespaced}
    assert not {resource for _, resource, _ in narrow} & cluster_scoped
