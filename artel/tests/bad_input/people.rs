//! What people type.

use serde_json::json;

use crate::tapes::{home, one, spec};
use crate::{Home, Ran, id, piped, says, sentence};

#[tokio::test]
async fn messages_that_are_empty_or_too_long_are_refused_and_change_nothing() {
    let home = home(&one());
    for text in ["", "  \n"] {
        let ran = home.run(&["new", text]).await.code(1);
        says(
            sentence(&ran),
            &["The message is empty", "write what you want"],
        );
    }
    let ran = home.run(&["projects", "--json"]).await.success();
    assert_eq!(ran.stdout, "");

    let ran = home.run(&["new", "Say hello", "--json"]).await.code(3);
    let (wait, project) = (ran.end()["wait"]["id"].clone(), id(&ran));
    let megabyte = vec![b'a'; 1024 * 1024];
    let (code, said) = piped(&home, &["new", "-"], &megabyte).await;
    assert_eq!(code, 1, "{said}");
    says(&said, &["1024 KiB", "at most 64 KiB", "send the essence"]);
    let (code, said) = piped(&home, &["say", &project, "-"], &megabyte).await;
    assert_eq!(code, 1, "{said}");
    says(&said, &["1024 KiB", "at most 64 KiB"]);
    let ran = home.run(&["say", &project, ""]).await.code(1);
    says(sentence(&ran), &["The message is empty"]);

    // Nothing was lost, nothing was added.
    let report = home.status(&project).await;
    assert_eq!(report["waits"][0]["id"], wait, "{report:#}");
    let projects = home.run(&["projects", "--json"]).await.success();
    assert_eq!(projects.json().len(), 1, "{projects:#?}");
}

#[tokio::test]
async fn names_never_lead_out_of_the_data_folder() {
    let mut tape = one();
    spec(&mut tape)["name"] = json!("../../etc");
    let home = home(&tape);
    for args in [
        &["status", "../x"][..],
        &["clone", "../../etc"],
        &["say", "../x", "hello"],
        &["stop", "../../etc/passwd"],
        &["remove", "..", "--yes"],
        &["secrets", "list", "../x"],
    ] {
        let ran = home.run(args).await.code(1);
        says(sentence(&ran), &["there is no project", "artel projects"]);
    }
    home.run(&["new", "Say hello", "--yes"]).await.success();
    let report = home.status("etc").await;
    assert_eq!(report["project"]["slug"], "etc");
    let repository = report["project"]["repository"].as_str().unwrap();
    assert!(
        repository.starts_with(&*home.file("repos").to_string_lossy()),
        "{repository}"
    );
    home.run(&["clone", "etc"]).await.success();
    assert!(home.file("etc/hello.txt").is_file());
    let ran = home.run(&["clone", "etc"]).await.code(1);
    says(sentence(&ran), &["etc"]);
    let ran = home.run(&["secrets", "set", "etc", "../KEY"]).await.code(1);
    says(sentence(&ran), &["cannot name a secret", "capital letter"]);
    home.run(&["remove", "etc", "--yes"]).await.success();
}

#[tokio::test]
async fn commands_that_are_none_and_waits_that_are_gone_are_said_so() {
    let home = home(&one());
    for args in [
        &["frobnicate"][..],
        &[],
        &["new"],
        &["graph", "--format", "gif"],
        &["project", "set", "x", "colour", "red"],
    ] {
        let ran = home.run(args).await.code(2);
        says(&ran.stderr, &["--help"]);
    }
    for args in [
        &["approve", "nothing"][..],
        &["reject", "../x"],
        &["answer", "w0", "yes"],
    ] {
        let ran = home.run(args).await.code(1);
        says(
            sentence(&ran),
            &["nothing waits under", args[1], "artel status"],
        );
    }
    for args in [
        &["cancel", "x"][..],
        &["retry", "x"],
        &["deploy", "x"],
        &["logs", "x"],
    ] {
        let ran = home.run(args).await.code(1);
        says(
            sentence(&ran),
            &["there is no project \"x\"", "artel projects"],
        );
    }
    let ran = home.run(&["history", "nothing"]).await.code(1);
    says(sentence(&ran), &["nothing"]);

    let ran = home.run(&["new", "Say hello", "--json"]).await.code(3);
    let project = id(&ran);
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await;
    assert!([0, 3].contains(&ran.code), "{ran:#?}");
    for command in ["approve", "reject"] {
        let ran = home.run(&[command, &wait]).await.code(1);
        says(sentence(&ran), &["answered before", "nothing changed"]);
    }
    for args in [&["cancel", &project][..], &["retry", &project]] {
        let ran = home.run(args).await.code(1);
        says(sentence(&ran), &[&project]);
    }
    for args in [
        &["rollback", &project][..],
        &["start", &project],
        &["logs", &project, "--service"],
    ] {
        let ran = home.run(args).await;
        assert!(ran.code == 1, "{ran:#?}");
        says(sentence(&ran), &["deployed"]);
    }
}

/// Nothing of what a terminal would obey was printed.
#[track_caller]
fn obeyed(ran: &Ran) -> String {
    let said = format!("{}{}", ran.stdout, ran.stderr);
    let obeys = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    said.chars().filter(|c| obeys(*c)).collect()
}

#[tokio::test]
async fn words_that_a_terminal_would_obey_reach_it_from_no_command() {
    const EVIL: &str = "\u{1b}[2J\u{9b}31m\u{202e}gpj.exe\u{2066}";
    let mut tape = one();
    spec(&mut tape)["goal"] = json!(format!("Says {EVIL} hello"));
    let home: Home = home(&tape);
    let message = format!("Say {EVIL} hello");
    let ran = home.run(&["new", &message]).await.code(3);
    assert_eq!(obeyed(&ran), "", "{ran:#?}");
    let ran = home.run(&["projects", "--json"]).await.success();
    let project = ran.json()[0]["id"].as_str().unwrap().to_owned();
    let repository = format!("/srv/{EVIL}.git");
    let set = ["project", "set", &project, "repo", &repository];
    let ran = home.run(&set).await.success();
    assert_eq!(obeyed(&ran), "", "{ran:#?}");
    for args in [
        &["projects"][..],
        &["status", &project],
        &["logs", &project],
        &["threads"],
        &["history", &project],
    ] {
        for json in [false, true] {
            let mut args = args.to_vec();
            if json {
                args.push("--json");
            }
            let ran = home.run(&args).await;
            assert_eq!(obeyed(&ran), "", "{ran:#?}");
            assert!(!json || !ran.json().is_empty(), "{ran:#?}");
        }
    }
    for args in [
        &["status", EVIL][..],
        &["history", EVIL],
        &["approve", EVIL],
        &["secrets", "set", &project, EVIL],
    ] {
        let ran = home.run(args).await.code(1);
        assert_eq!(obeyed(&ran), "", "{ran:#?}");
    }
    // Programs read what was said.
    let report = home.status(&project).await;
    assert_eq!(report["project"]["repository"], repository, "{report:#}");
    let question = report["waits"][0]["question"].as_str().unwrap();
    assert!(question.contains(EVIL), "{question}");
}
