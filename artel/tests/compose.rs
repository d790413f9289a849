//! `docker-compose.yml` fits the program that it starts. (That Compose takes it is looked at by `make check`.)

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_yaml_ng::Value;
use support::Home;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn composition() -> Value {
    read("docker-compose.yml")
}

fn read(file: &str) -> Value {
    let text = std::fs::read_to_string(root().join(file)).unwrap();
    let mut value: Value = serde_yaml_ng::from_str(&text).unwrap();
    // What is merged in may merge something in itself.
    for _ in 0..3 {
        value.apply_merge().unwrap();
    }
    value
}

fn words(value: &Value) -> Vec<String> {
    match value {
        Value::Sequence(items) => items.iter().map(word).collect(),
        Value::Mapping(map) => map.keys().map(word).collect(),
        _ => Vec::new(),
    }
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn services(composition: &Value) -> Vec<(String, Value)> {
    let services = composition["services"].as_mapping().unwrap();
    services
        .iter()
        .map(|(name, service)| (word(name), service.clone()))
        .collect()
}

/// Those that are our program.
const OURS: [&str; 4] = ["runner", "scheduler", "bot", "spawner"];

#[test]
fn every_service_can_be_replaced_is_watched_bounded_and_started_again() {
    let composition = composition();
    let names: BTreeSet<String> = services(&composition).into_iter().map(|(n, _)| n).collect();
    let expected = ["bot", "postgres", "redis", "runner", "scheduler", "spawner"];
    assert_eq!(
        names.iter().map(String::as_str).collect::<Vec<_>>(),
        expected
    );
    for (name, service) in services(&composition) {
        assert!(word(&service["image"]).starts_with("${"), "{name}");
        assert_eq!(word(&service["restart"]), "unless-stopped", "{name}");
        assert!(!words(&service["healthcheck"]["test"]).is_empty(), "{name}");
        for limit in ["cpu_quota", "mem_limit", "pids_limit"] {
            assert!(!service[limit].is_null(), "{name}: {limit}: {service:#?}");
        }
        for other in words(&service["depends_on"]) {
            assert!(names.contains(&other), "{name} waits for {other}");
            assert_eq!(
                word(&service["depends_on"][&*other]["condition"]),
                "service_healthy"
            );
        }
        for network in words(&service["networks"]) {
            assert!(
                words(&composition["networks"]).contains(&network),
                "{name}: {network}"
            );
        }
        for volume in words(&service["volumes"]) {
            // A folder of the host instead, under its own name, when one is named.
            let folder = "${ARTEL_DATA:-artel}:${ARTEL_DATA:-/var/lib/artel}";
            let volume = volume.replace(folder, "artel:");
            let (volume, _) = volume.split_once(':').unwrap();
            assert!(
                words(&composition["volumes"]).contains(&volume.to_owned()),
                "{name}: {volume}"
            );
        }
    }
}

#[test]
fn secrets_are_files_that_make_up_makes() {
    let composition = composition();
    let known = words(&composition["secrets"]);
    let script = std::fs::read_to_string(root().join("scripts/up")).unwrap();
    for secret in &known {
        assert_eq!(
            word(&composition["secrets"][secret.as_str()]["file"]),
            format!(".secrets/{secret}")
        );
        assert!(
            ["secret", "address", "given"]
                .iter()
                .any(|how| script.contains(&format!("\n{how} {secret} "))),
            "scripts/up does not make {secret}"
        );
    }
    let mut used = BTreeSet::new();
    for (name, service) in services(&composition) {
        let given = words(&service["secrets"]);
        let environment = service["environment"].as_mapping().cloned();
        for (variable, value) in environment.unwrap_or_default() {
            let Some(secret) = word(&value)
                .strip_prefix("/run/secrets/")
                .map(str::to_owned)
            else {
                continue;
            };
            assert!(word(&variable).ends_with("_FILE"), "{name}: {variable:?}");
            assert!(given.contains(&secret), "{name} is not given {secret}");
        }
        used.extend(given);
    }
    assert_eq!(used, known.into_iter().collect());
}

/// The secrets of each service.
fn given(composition: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let all = services(composition).into_iter();
    all.map(|(name, service)| (name, words(&service["secrets"]).into_iter().collect()))
        .collect()
}

#[test]
fn a_service_is_given_the_credentials_that_it_uses_and_no_other() {
    let given = given(&composition());
    let bus = "redis_url";
    for (service, uses) in [
        ("postgres", &["postgres_password"][..]),
        ("redis", &["redis_password"]),
        ("bot", &["database_url", bus, "telegram_bot_token"]),
        ("runner", &["database_url", bus, "openai_api_key"]),
        ("scheduler", &["database_url", bus]),
        (
            "spawner",
            &[
                bus,
                "anthropic_api_key",
                "github_app_private_key",
                "github_token",
                "openai_api_key",
            ],
        ),
    ] {
        let uses: BTreeSet<_> = uses.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(given[service], uses, "{service}");
    }
}

#[test]
fn workers_get_containers_of_their_own_by_one_more_file_which_changes_the_spawner_alone() {
    let more = read("docker-compose.docker.yml");
    assert_eq!(words(&more), ["services"]);
    assert_eq!(words(&more["services"]), ["spawner"]);
    let spawner = &more["services"]["spawner"];
    let environment = &spawner["environment"];
    let runtime = word(&environment["SPAWNER_RUNTIME"]);
    assert_eq!(
        runtime, "${SPAWNER_RUNTIME:-sysbox-runc}",
        "Sysbox, unless another one is chosen"
    );
    let settings = std::fs::read_to_string(root().join(".env.example")).unwrap();
    for variable in words(environment) {
        assert!(settings.contains(&format!("\n# {variable}=")), "{variable}");
    }
    let volumes = words(&spawner["volumes"]);
    let [data, socket] = volumes.as_slice() else {
        panic!("{volumes:?}");
    };
    let (outside, inside) = data.split_at(data.len() / 2);
    assert_eq!(outside, &inside[1..], "the engine finds what it mounts");
    assert!(socket.ends_with(":/var/run/docker.sock"));
    for (name, service) in services(&composition()) {
        assert!(
            words(&service["volumes"])
                .iter()
                .all(|volume| !volume.contains("docker.sock")),
            "{name} has the engine"
        );
    }
}

#[test]
fn our_services_know_only_settings_that_there_are_and_a_spawner_knows_no_database() {
    let composition = composition();
    let settings = std::fs::read_to_string(root().join(".env.example")).unwrap();
    let is_setting = |name: &str| settings.contains(&format!("\n# {name}="));
    for (name, service) in services(&composition) {
        if !OURS.contains(&name.as_str()) {
            continue;
        }
        for variable in words(&service["environment"]) {
            assert!(
                is_setting(&variable) || variable.strip_suffix("_FILE").is_some_and(is_setting),
                "{name}: {variable} is no setting"
            );
        }
    }
    let spawner = &composition["services"]["spawner"];
    assert!(
        words(&spawner["environment"])
            .iter()
            .all(|variable| !variable.starts_with("DATABASE"))
    );
    assert!(!words(&spawner["secrets"]).contains(&"database_url".to_owned()));
    assert!(!words(&spawner["networks"]).contains(&"data".to_owned()));
}

#[tokio::test]
async fn commands_and_health_checks_are_those_of_the_program() {
    let composition = composition();
    let home = Home::new();
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    for name in OURS {
        let service = &composition["services"][name];
        let target = word(&service["build"]["target"]);
        assert!(
            dockerfile.contains(&format!(" AS {target}\n"))
                && dockerfile.contains(&format!("ENTRYPOINT [\"{target}\"]")),
            "{name}: {target}"
        );
        // Whoever runs sandboxes begins as root and gives that up; nobody else does.
        let begins = words(&service["entrypoint"]);
        if ["scheduler", "spawner"].contains(&name) {
            assert_eq!(begins, ["unmasked", &target], "{name}");
        } else {
            assert!(begins.is_empty() && service["user"].is_null(), "{name}");
        }
        for argument in words(&service["build"]["args"]) {
            assert!(
                dockerfile.contains(&format!("\nARG {argument}=")),
                "{argument}"
            );
        }
        let test = words(&service["healthcheck"]["test"]);
        assert_eq!(test[..2], ["CMD".to_owned(), target.clone()], "{name}");
        assert_eq!(test[2..], ["health"], "{name}");
        if target == "artel" {
            let command = words(&service["command"]);
            assert_eq!(command, [name]);
            home.run(&[name, "--help"]).await.success();
        }
    }
    home.run(&["health", "--help"]).await.success();
    let ran = home.spawner(&["--help"]).await;
    assert!(ran.success().stdout.contains("bus"), "it is the spawner");
    // Nothing answers there.
    home.spawner(&["health"]).await.code(1);
}

#[test]
fn make_up_makes_secrets_once_and_names_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let scripts = folder.path().join("scripts");
    std::fs::create_dir(&scripts).unwrap();
    for script in ["up", "setting"] {
        let from = root().join("scripts").join(script);
        std::fs::copy(from, scripts.join(script)).unwrap();
    }
    let run_with = |token: &str, more: &[(&str, &str)]| {
        std::process::Command::new("bash")
            .arg(scripts.join("up"))
            .arg("--only-secrets")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("TELEGRAM_BOT_TOKEN", token)
            .envs(more.iter().copied())
            .output()
            .unwrap()
    };
    let run = |token: &str| run_with(token, &[]);
    let first = run("");
    assert!(!first.status.success());
    let said = String::from_utf8_lossy(&first.stderr);
    for name in ["TELEGRAM_BOT_TOKEN", "OPENAI_BASE_URL", "ARTEL_TAPE"] {
        assert!(said.contains(name), "{said}");
    }
    let secret =
        |name: &str| std::fs::read_to_string(folder.path().join(".secrets").join(name)).unwrap();
    let password = secret("postgres_password");
    assert_eq!(password.len(), 48);

    std::fs::write(
        folder.path().join(".env"),
        "ARTEL_TAPE=demo\nPOSTGRES_PORT=25432\n",
    )
    .unwrap();
    let mine = "redis://mine@redis:6379/0";
    std::fs::write(folder.path().join(".secrets/redis_url"), mine).unwrap();
    let second = run("12:abc");
    assert!(second.status.success(), "{second:?}");
    assert_eq!(secret("telegram_bot_token"), "12:abc");
    assert_eq!(secret("postgres_password"), password, "made once");
    assert_eq!(
        secret("database_url"),
        format!("postgres://artel:{password}@postgres:25432/artel"),
        "an address goes with the port"
    );
    assert_eq!(secret("redis_url"), mine, "what a person put there stays");

    // What people are given elsewhere is taken from the settings, and stays until another one is set.
    assert_eq!(secret("openai_api_key"), "");
    let key = folder.path().join("app.pem");
    std::fs::write(&key, "a key\n").unwrap();
    let key = key.display().to_string();
    let third = run_with(
        "12:def",
        &[
            ("OPENAI_API_KEY", "sk-one"),
            ("ANTHROPIC_API_KEY", "sk-two"),
            ("GITHUB_APP_PRIVATE_KEY_FILE", &key),
        ],
    );
    assert!(third.status.success(), "{third:?}");
    assert!(run("").status.success());
    for (name, value) in [
        ("telegram_bot_token", "12:def"),
        ("openai_api_key", "sk-one"),
        ("anthropic_api_key", "sk-two"),
        ("github_token", ""),
        ("github_app_private_key", "a key\n"),
    ] {
        assert_eq!(secret(name), value, "{name}");
    }
    let nameless = run_with(
        "",
        &[("ARTEL_TAPE", ""), ("OPENAI_BASE_URL", "http://m/v1")],
    );
    assert!(nameless.status.success(), ".env goes on: {nameless:?}");
    std::fs::write(folder.path().join(".env"), "").unwrap();
    let nameless = run_with("", &[("OPENAI_BASE_URL", "http://m/v1")]);
    let said = String::from_utf8_lossy(&nameless.stderr);
    assert!(
        !nameless.status.success() && said.contains("ARTEL_MODEL"),
        "{said}"
    );
    let mode = std::fs::metadata(folder.path().join(".secrets")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode.permissions());
    assert_eq!(mode & 0o777, 0o700);
}
