//! What is read, in which order, and what is said about what is wrong.

use super::*;

fn load(files: &[(&str, &str)]) -> Result<Config, Error> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(
            folder.path().join(name),
            text.replace("FOLDER", &folder.path().display().to_string()),
        )
        .unwrap();
    }
    Config::load(folder.path())
}

/// Tests run with whatever environment there is; these settings are hardly in it.
const HOME: (&str, &str) = (".env", "ARTEL_HOME=FOLDER/home\nSPAWNER_MAX_WORKERS=3\n");

#[test]
fn dotenv_goes_before_the_file_and_the_file_before_the_default() {
    let config = load(&[
        HOME,
        ("artel.toml", "spawner_max_workers = 7\nartel_ports = \"3000-3010\"\nadmin_chat_ids = [5, -6]\n[policy]\n"),
    ])
    .unwrap();
    assert_eq!(config.max_workers, 3);
    assert_eq!(config.ports, (3000, 3010));
    assert_eq!(config.admin_chat_ids, [5, -6]);
    assert_eq!(config.agent, "artel-agent");
    let explained = config.explain();
    let source = |name: &str| {
        explained
            .iter()
            .find(|setting| setting.name == name)
            .unwrap()
            .source
            .clone()
    };
    assert!(
        source("SPAWNER_MAX_WORKERS").contains("/.env"),
        "{}",
        source("SPAWNER_MAX_WORKERS")
    );
    assert!(
        source("ARTEL_PORTS").ends_with("artel.toml"),
        "{}",
        source("ARTEL_PORTS")
    );
    assert_eq!(source("ARTEL_AGENT"), "default");
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_without_secrets() {
    for (toml, says) in [
        ("spawner_max_workers = \"many\"", "from 1 to 64"),
        (
            "\nspawner_max_wokers = 1",
            "artel.toml, line 2: \"spawner_max_wokers\"",
        ),
        ("SPAWNER_MAX_WORKERS = 1", "small letters"),
        ("spawner_cpus = \"all\"", "a number of cores"),
        ("spawner_memory_mb = 1", "a number of MiB"),
        ("spawner_runtime = \"docker\"", "`sysbox-runc`"),
        (
            "artel_mode = \"embedded\"\nspawner_max_workers = 0",
            "artel.toml, line 2)",
        ),
        ("\n\nartel_ports = [", "artel.toml, line 3 cannot"),
        ("openai_api_key = hunter2", "line 1"),
        ("[policy]\nmax_atempts = 3", "line 2: policy.max_atempts"),
        (
            "[policy]\nmax_attempts = \"three\"",
            "line 2: policy.max_attempts",
        ),
        ("[policy.limits]\nwall = 3", "line 2: policy.limits.wall"),
        (
            "[policy.limits]\nwall_s = -3",
            "line 2: policy.limits.wall_s",
        ),
        ("[models]\n\nmodle = \"x\"", "line 3: models.modle"),
        (
            "[models.budget]\ntokens = \"many\"",
            "line 2: models.budget.tokens",
        ),
        ("artel_agent = \"command\"", "ARTEL_AGENT_COMMAND"),
        ("redis_url = \"http://me:hunter2@host\"", "redis://"),
        ("openai_base_url = \"ftp://x\"", "http://"),
        (
            "github_token = \"hunter2\"\ngithub_app_id = 7",
            "GITHUB_TOKEN is set as well",
        ),
        ("github_app_id = 7", "GITHUB_APP_PRIVATE_KEY_FILE"),
        ("github_app_id = \"my-app\"", "a number"),
        ("github_app_id = \"Iv1 or so\"", "a number"),
        (
            "github_app_private_key_file = \"FOLDER/artel.toml\"",
            "GITHUB_APP_ID",
        ),
        ("database_url = \"mysql://me:hunter2@host\"", "postgres://"),
    ] {
        let error = load(&[(".env", "ARTEL_HOME=FOLDER/home\n"), ("artel.toml", toml)])
            .err()
            .map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("{toml} is fine?"));
        assert!(error.contains(says), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn one_limit_can_be_set_without_the_others() {
    let toml = "[policy]\nmax_attempts = 1\n[policy.limits]\nwall_s = 5\n";
    let policy = load(&[HOME, ("artel.toml", toml)])
        .unwrap()
        .policy()
        .unwrap();
    let mut expected = nodes::Policy {
        max_attempts: 1,
        ..nodes::Policy::default()
    };
    expected.limits.wall_s = 5;
    assert_eq!(policy, expected);
}

#[test]
fn a_secret_may_stand_in_a_file_that_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "12:abc\n").unwrap();
    let file = file.display().to_string();
    let layer = |pairs: &[(&str, &str)]| {
        Layer::from_variables(|name| {
            let (_, value) = pairs.iter().find(|(known, _)| *known == name)?;
            Some((*value).to_owned())
        })
    };
    let value = |pairs: &[(&str, &str)], name: &str| {
        let figment = Figment::from(layer(pairs).unwrap());
        Reader { figment: &figment }.text(name)
    };
    let named = [("TELEGRAM_BOT_TOKEN_FILE", file.as_str())];
    assert_eq!(value(&named, "TELEGRAM_BOT_TOKEN").unwrap(), "12:abc");
    let both = [("TELEGRAM_BOT_TOKEN", "34:def"), named[0]];
    assert_eq!(value(&both, "TELEGRAM_BOT_TOKEN").unwrap(), "34:def");
    // What is no secret is not looked for in files, and the file of an age identity is a setting of its own.
    assert_eq!(value(&[("ARTEL_MODEL_FILE", &file)], "ARTEL_MODEL"), None);
    let age = [("SOPS_AGE_KEY_FILE", file.as_str())];
    assert_eq!(value(&age, "SOPS_AGE_KEY"), None);
    assert_eq!(value(&age, "SOPS_AGE_KEY_FILE").unwrap(), file);

    let error = layer(&[("DATABASE_URL_FILE", "/nowhere/url")]).err();
    let error = error.map(|error| error.to_string()).unwrap();
    assert!(
        error.contains("/nowhere/url") && error.contains("DATABASE_URL_FILE"),
        "{error}"
    );
}

#[test]
fn a_broken_dotenv_is_named_with_its_line_and_without_its_text() {
    let error = load(&[(
        ".env",
        "ARTEL_HOME=FOLDER/home\nOPENAI_API_KEY=hunter2 and more\n",
    )])
    .err()
    .map(|error| error.to_string());
    let error = error.expect("a value with spaces needs quotes");
    assert!(error.contains(".env, line 2"), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn what_a_process_needs_is_named_all_at_once() {
    let config = |toml: &str| load(&[HOME, ("artel.toml", toml)]).unwrap();
    let missing = |toml: &str, need| {
        let fits = config(toml).fits(need);
        fits.err()
            .map_or_else(String::new, |error| error.to_string())
    };
    let named = |text: &str| {
        [
            "DATABASE_URL",
            "REDIS_URL",
            "TELEGRAM_BOT_TOKEN",
            "ARTEL_TAPE",
        ]
        .into_iter()
        .filter(|name| text.contains(name))
        .collect::<Vec<_>>()
    };
    assert_eq!(missing("", Need::Data), "");
    assert_eq!(
        named(&missing("", Need::Servers)),
        ["DATABASE_URL", "REDIS_URL"]
    );
    assert_eq!(
        named(&missing("", Need::Bot)),
        ["DATABASE_URL", "REDIS_URL", "TELEGRAM_BOT_TOKEN"]
    );
    assert_eq!(named(&missing("", Need::Bus)), ["REDIS_URL"]);

    let full = "artel_mode = \"full\"\n";
    assert_eq!(missing(full, Need::Nothing), "");
    let all = missing(full, Need::Data);
    assert!(all.starts_with("ARTEL_MODE=full"), "{all}");
    assert_eq!(named(&all), ["DATABASE_URL", "REDIS_URL", "ARTEL_TAPE"]);
    assert_eq!(
        named(&missing(full, Need::Bus)),
        ["REDIS_URL", "ARTEL_TAPE"],
        "a spawner has no database"
    );
    let whole = format!(
        "{full}database_url = \"postgres://host/name\"\nredis_url = \"redis://host\"\nartel_tape = \"demo\"\n"
    );
    assert_eq!(missing(&whole, Need::Servers), "");
}

#[test]
fn the_full_size_runs_workers_in_sysbox_unless_another_runtime_is_chosen() {
    let runtime = |text: &str| load(&[(".env", text)]).unwrap();
    let small = runtime("ARTEL_MODE=embedded\n");
    assert_eq!(small.docker_runtime, None);
    let spawner = small.of_spawner().docker_runtime;
    assert_eq!(spawner.as_deref(), Some("sysbox-runc"));
    let full = runtime("ARTEL_MODE=full\n");
    assert_eq!(full.docker_runtime.as_deref(), Some("sysbox-runc"));
    for (chosen, expected) in [("bubblewrap", None), ("runc", Some("runc"))] {
        let config = runtime(&format!("ARTEL_MODE=full\nSPAWNER_RUNTIME={chosen}\n"));
        assert_eq!(config.docker_runtime.as_deref(), expected);
        assert_eq!(config.of_spawner().docker_runtime.as_deref(), expected);
    }
}

#[test]
fn history_stays_for_a_month_unless_told_otherwise() {
    let history = |text: &str| load(&[HOME, ("artel.toml", text)]).map(|config| config.history);
    let days = |days: u64| Some(Duration::from_hours(24 * days));
    assert_eq!(history("").unwrap(), days(30));
    assert_eq!(history("artel_history = \"7d\"").unwrap(), days(7));
    assert_eq!(history("artel_history = \"48h\"").unwrap(), days(2));
    assert_eq!(history("artel_history = \"forever\"").unwrap(), None);
    for wrong in ["0d", "30", "-1d", "a while", "9999999999999999999d"] {
        let error = history(&format!("artel_history = \"{wrong}\"")).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("ARTEL_HISTORY") && said.contains("30d"),
            "{said}"
        );
    }
}

#[test]
fn a_github_app_has_an_id_and_a_key_and_a_file_with_nothing_in_it_is_none() {
    let github = |toml: &str| {
        load(&[HOME, ("empty", ""), ("artel.toml", toml)])
            .unwrap()
            .github
    };
    let both = "github_app_id = 4711\ngithub_app_private_key_file = \"app.pem\"";
    let Some(GitHubLogin::App(id, key)) = github(both) else {
        panic!("it is an app");
    };
    assert_eq!((id.as_str(), key.as_path()), ("4711", Path::new("app.pem")));
    let empty = "github_app_private_key_file = \"FOLDER/empty\"";
    assert!(github(empty).is_none());
    let token = github(&format!("{empty}\ngithub_token = \"t\""));
    assert!(matches!(token, Some(GitHubLogin::Token(_))));
}
