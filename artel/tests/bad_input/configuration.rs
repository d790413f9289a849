//! What is configured.

use crate::support::Home;
use crate::{says, sentence};

#[tokio::test]
async fn a_broken_configuration_is_named_with_file_and_line_before_anything_is_done() {
    let home = Home::new();
    let file = home.file("artel.toml");
    for (text, line, parts) in [
        (
            "artel_log = \"text\"\nartel_ports = [\n",
            "line 2",
            &["cannot be read"][..],
        ),
        (
            "\n\nthis is prose\n",
            "line 3",
            &["cannot be read", "mend it"],
        ),
        (
            "\nspawner_max_wokers = 2\n",
            "line 2",
            &["spawner_max_wokers", "artel config check"],
        ),
        (
            "spawner_max_workers = \"many\"\n",
            "line 1",
            &["SPAWNER_MAX_WORKERS", "many", "from 1 to 64"],
        ),
        (
            "[policy]\nmax_attempts = \"three\"\n",
            "line 2",
            &["policy.max_attempts", "mend that line"],
        ),
        (
            "[policy]\nmax_atempts = 3\n",
            "line 2",
            &["policy.max_atempts", "max_attempts"],
        ),
        (
            "[policy.limits]\nwall_s = -1\n",
            "line 2",
            &["policy.limits.wall_s"],
        ),
        ("[models]\nmodle = \"x\"\n", "line 2", &["models.modle"]),
    ] {
        std::fs::write(&file, text).unwrap();
        for args in [
            &["projects"][..],
            &["config", "check"],
            &["new", "Say hello"],
        ] {
            let ran = home.run(args).await.code(2);
            says(sentence(&ran), &[&file.to_string_lossy(), line]);
            says(sentence(&ran), parts);
        }
    }
    assert!(!home.file("artel.db").exists(), "nothing was done");
    std::fs::remove_file(&file).unwrap();

    let secret = "sk-canary-1234 and-more";
    std::fs::write(home.file(".env"), format!("\nOPENAI_API_KEY={secret}\n")).unwrap();
    let ran = home.run(&["projects"]).await.code(2);
    says(sentence(&ran), &[".env, line 2", "NAME=value"]);
    assert!(!ran.stderr.contains("canary"), "{ran:#?}");
    std::fs::remove_file(home.file(".env")).unwrap();
    home.run(&["projects"]).await.success();
}

#[tokio::test]
async fn what_is_missing_from_the_environment_is_named() {
    let mut home = Home::new();
    home.set("ARTEL_MODE", "full");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE=full", "DATABASE_URL", "REDIS_URL"],
    );
    home.set("DATABASE_URL", "postgres://nobody@127.0.0.1:9/nothing");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE=full", "REDIS_URL", "ARTEL_MODE=embedded"],
    );
    home.set("ARTEL_MODE", "half");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE", "half", "`embedded` or `full`"],
    );
    home.set("ARTEL_MODE", "embedded");
    let ran = home.run(&["projects"]).await.code(1);
    says(&ran.stderr, &["127.0.0.1:9"]);

    let mut home = Home::new();
    home.set("ARTEL_TAPE", "/nowhere/tape.yaml");
    let ran = home.run(&["new", "Say hello"]).await.code(2);
    says(
        sentence(&ran),
        &["/nowhere/tape.yaml", "is the path right?"],
    );
    std::fs::write(home.file("no-tape.yaml"), "answers: 3\n").unwrap();
    let tape = home.file("no-tape.yaml").display().to_string();
    home.set("ARTEL_TAPE", &tape);
    let ran = home.run(&["new", "Say hello"]).await.code(2);
    says(sentence(&ran), &[&tape, "not a tape"]);
    home.set("ARTEL_TAPE", "demo");
    home.set("ARTEL_AGENT", "command");
    let ran = home.run(&["projects"]).await.code(2);
    says(sentence(&ran), &["ARTEL_AGENT_COMMAND"]);
}

#[tokio::test]
async fn a_github_app_that_cannot_be_used_is_refused_at_the_start_by_the_name_of_its_setting() {
    let mut home = Home::with_tape();
    home.set("SPAWNER_RUNTIME", "bubblewrap");
    home.set("REDIS_URL", "redis://127.0.0.1:9");
    home.set("GITHUB_APP_ID", "4711");
    home.set("GITHUB_TOKEN", "ghp_canary0123456789");
    let ran = home.spawner(&[]).await.code(2);
    says(
        sentence(&ran),
        &["GITHUB_APP_ID", "GITHUB_TOKEN is set as well", "take one"],
    );
    home.set("GITHUB_TOKEN", "");
    let ran = home.spawner(&[]).await.code(2);
    says(
        sentence(&ran),
        &[
            "GITHUB_APP_ID",
            "name its file in GITHUB_APP_PRIVATE_KEY_FILE",
        ],
    );

    let key = home.file("app.pem");
    home.set("GITHUB_APP_PRIVATE_KEY_FILE", &key.display().to_string());
    let ran = home.spawner(&[]).await.code(2);
    says(
        sentence(&ran),
        &[
            "GITHUB_APP_PRIVATE_KEY_FILE",
            &key.to_string_lossy(),
            "cannot be read",
            "No such file",
        ],
    );
    std::fs::write(&key, "canary, but no key").unwrap();
    let ran = home.spawner(&[]).await.code(2);
    says(
        sentence(&ran),
        &[
            &key.to_string_lossy(),
            "no key that can be used",
            "the file that GitHub gives",
        ],
    );
    assert!(!ran.stderr.contains("canary"), "{ran:#?}");
    home.set("GITHUB_APP_ID", "");
    let ran = home.spawner(&[]).await.code(2);
    says(
        sentence(&ran),
        &["GITHUB_APP_PRIVATE_KEY_FILE", "set GITHUB_APP_ID"],
    );
}
