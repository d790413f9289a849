use ports::{Audience, JobKind, Record as _, Role, Slug, WaitKind};
use serde_json::json;
use store::FindProject;

use crate::journal::{Journal, P, spec};
use crate::world::World;

on_both!(
    a_report_is_the_documented_object,
    a_spending_is_counted_once,
    costs_without_a_price_are_null,
    two_projects_never_have_one_slug,
    a_free_slug_is_given_to_one_project_only,
    a_project_is_found_by_what_people_type,
    the_conversation_is_kept_as_it_was_shown,
    a_wait_knows_where_its_answer_goes,
);

async fn a_report_is_the_documented_object(world: &World) {
    let journal = Journal::whole_life();
    world.projector.catch_up(&journal).await.unwrap();
    let report = world.store.status(&P.into()).await.unwrap().unwrap();
    let mut value = serde_json::to_value(&report).unwrap();
    for deployment in value["deployments"].as_array_mut().unwrap() {
        let at = deployment.as_object_mut().unwrap().remove("at").unwrap();
        assert!(at.as_str().unwrap().starts_with("2026-03-01T10:0"), "{at}");
    }
    let url = "http://127.0.0.1:20000/";
    assert_eq!(
        value,
        json!({
            "project": {
                "id": P, "slug": "notes", "name": "Notes service", "status": "deployed", "url": url,
                "repository": "/repos/notes.git", "cost_usd": 0.26, "tokens": 333
            },
            "job": {"id": "job-2", "status": "deployed", "node": null},
            "tasks": [{
                "id": "x", "title": "The x", "status": "merged", "attempts": 1, "review_rounds": 1,
                "pull_request": {"number": 5, "status": "merged", "url": "repo/pull/5"},
                "depends_on": [], "cost_usd": null
            }],
            "waits": [],
            "deployments": [
                {"release": 3, "sha": "sha3", "status": "live", "url": url},
                {"release": 2, "sha": "sha2", "status": "rolled_back", "url": url},
                {"release": 1, "sha": "sha1", "status": "superseded", "url": url}
            ]
        })
    );
    let first = world.store.tasks(&P.into(), &"job-1".into()).await.unwrap();
    let ids: Vec<_> = first.iter().map(|t| t.id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c", "d"]);
    assert_eq!(first[0].cost_usd, Some(0.25));
    assert_eq!(first[3].depends_on, ["b".into(), "c".into()]);
    assert_eq!(world.store.status(&"nobody".into()).await.unwrap(), None);
}

async fn a_spending_is_counted_once(world: &World) {
    let mut journal = Journal::new();
    journal
        .spent("s1", Role::Developer, Some(0.5))
        .spent("s1", Role::Developer, Some(0.5))
        .spent("s2", Role::Developer, Some(0.25))
        .spent("s3", Role::Reviewer, None);
    world.projector.catch_up(&journal).await.unwrap();
    let spent = world.store.spent(&P.into()).await.unwrap();
    assert_eq!((spent.cost_usd, spent.tokens), (0.75, 333));
    let sums = world.store.ledger_sums(Some(&P.into())).await.unwrap();
    let sums: Vec<_> = sums
        .iter()
        .map(|s| (s.role, s.model.as_str(), s.cost_usd, s.tokens))
        .collect();
    assert_eq!(
        sums,
        [
            (Role::Developer, "m1", Some(0.75), 222),
            (Role::Reviewer, "m1", None, 111)
        ]
    );
    assert_eq!(
        world.store.ledger_lines(&P.into(), 10).await.unwrap().len(),
        3
    );
    assert_eq!(
        world.store.projects().await.unwrap(),
        [],
        "spending founds no project"
    );
}

async fn costs_without_a_price_are_null(world: &World) {
    let mut journal = Journal::new();
    journal
        .founded()
        .spent("s1", Role::Brainstorm, None)
        .say(ports::Event::BudgetRaised {
            limit_usd: None,
            limit_tokens: Some(5000),
            by: "telegram:1".to_owned(),
        });
    world.projector.catch_up(&journal).await.unwrap();
    let projects = world.store.projects().await.unwrap();
    assert_eq!((projects[0].cost_usd, projects[0].tokens), (None, 111));
    let spent = world.store.spent(&P.into()).await.unwrap();
    assert_eq!((spent.limit_usd, spent.limit_tokens), (None, Some(5000)));
}

async fn two_projects_never_have_one_slug(world: &World) {
    let journal = Journal::whole_life();
    world.projector.catch_up(&journal).await.unwrap();
    let mut slugs: Vec<_> = world
        .store
        .projects()
        .await
        .unwrap()
        .into_iter()
        .map(|p| (p.id.to_string(), p.slug))
        .collect();
    slugs.sort();
    assert_eq!(
        slugs,
        [
            (P.to_owned(), "notes".to_owned()),
            ("pbbbbbbbbbb".to_owned(), "notes-2".to_owned())
        ]
    );
}

async fn a_free_slug_is_given_to_one_project_only(world: &World) {
    let wanted = Slug::parse("notes").unwrap();
    let other = world.another().await;
    let (one, two) = (P.into(), "pbbbbbbbbbb".into());
    let (a, b) = tokio::join!(
        world.store.free_slug(&one, &wanted),
        other.free_slug(&two, &wanted)
    );
    let (a, b) = (a.unwrap(), b.unwrap());
    let mut given = [a.as_str(), b.as_str()];
    given.sort_unstable();
    assert_eq!(given, ["notes", "notes-2"]);
    // Asked again it is the same one, and another wish frees the first.
    assert_eq!(world.store.free_slug(&one, &a).await.unwrap(), a);
    let diary = Slug::parse("diary").unwrap();
    assert_eq!(world.store.free_slug(&one, &diary).await.unwrap(), diary);
    assert_eq!(other.free_slug(&two, &a).await.unwrap(), a);
    other.close().await;
}

async fn a_project_is_found_by_what_people_type(world: &World) {
    let journal = Journal::whole_life();
    world.projector.catch_up(&journal).await.unwrap();
    let found = async |text: &str| world.store.find_project(text).await;
    for text in [P, "notes", " paa "] {
        assert_eq!(found(text).await.unwrap().record.id.as_str(), P, "{text:?}");
    }
    assert_eq!(
        found("notes-").await.unwrap().record.id.as_str(),
        "pbbbbbbbbbb"
    );
    assert!(
        matches!(found("note").await, Err(FindProject::Ambiguous { fits, .. }) if fits == ["notes", "notes-2"])
    );
    for text in ["", "%", "_", "../notes", "x"] {
        assert!(
            matches!(found(text).await, Err(FindProject::Unknown(_))),
            "{text:?}"
        );
    }
    let details = found("notes").await.unwrap();
    assert_eq!(details.owner, Some("telegram:7".into()));
    assert_eq!(details.port, Some(20000));
}

async fn the_conversation_is_kept_as_it_was_shown(world: &World) {
    let journal = Journal::whole_life();
    world.projector.catch_up(&journal).await.unwrap();
    let messages = world.store.messages(&P.into(), 100).await.unwrap();
    let kinds: Vec<_> = messages.iter().map(|m| m.kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "message", "question", "answer", "reply", "question", "answer", "question", "answer",
            "result", "message", "answer"
        ]
    );
    assert_eq!(messages[0].author.as_deref(), Some("telegram:7"));
    assert!(messages[0].text.starts_with("a notes service"));
    let last = world.store.messages(&P.into(), 2).await.unwrap();
    assert_eq!(last, messages[messages.len() - 2..]);
}

async fn a_wait_knows_where_its_answer_goes(world: &World) {
    let mut journal = Journal::new();
    journal
        .founded()
        .specified("notes")
        .job("job-1", JobKind::New { spec: spec() })
        .asks("w1", WaitKind::Deploy, Audience::Owner);
    world.projector.catch_up(&journal).await.unwrap();
    let wait = world.store.wait(&"w1".into()).await.unwrap().unwrap();
    assert!(wait.open);
    assert_eq!(wait.thread, format!("{P}/job-1"));
    assert_eq!(wait.interrupt, "interrupt-w1");
    assert_eq!(wait.kind, WaitKind::Deploy);
    assert_eq!(wait.to_record().options, ["approve", "reject"]);
    assert_eq!(world.store.open_waits(None).await.unwrap(), [wait]);

    journal
        .answered("w1", Some("approve"))
        .answered("w1", Some("reject"));
    world.projector.catch_up(&journal).await.unwrap();
    let wait = world.store.wait(&"w1".into()).await.unwrap().unwrap();
    assert!(!wait.open);
    assert_eq!(wait.answer.as_deref(), Some("approve"), "the first counts");
    assert_eq!(world.store.wait(&"w9".into()).await.unwrap(), None);
}
