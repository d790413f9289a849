use super::*;

const FULL: &str = r#"
    model = "small"
    [endpoints.default]
    base_url = "https://models.example/v1/"
    api_key_env = "OPENAI_API_KEY"
    [endpoints.backup]
    base_url = "http://127.0.0.1:8000/v1"
    [roles.architect]
    models = ["large", { endpoint = "backup", model = "other" }]
    temperature = 0.2
    max_output_tokens = 16000
    [prices."large"]
    input_per_million_usd = 1.0
    output_per_million_usd = 10.0
    as_of = "2026-05-01"
    [budget]
    cost_usd = 2.5
    [retry]
    tries = 3
"#;

#[test]
fn the_tables_of_the_configuration_are_read() {
    let mut config: Config = toml::from_str(FULL).unwrap();
    config.validate().unwrap();
    assert!(config.is_complete());
    let chain = config.chain(Role::Architect);
    assert_eq!(chain[0].parts(), ("default", "large"));
    assert_eq!(chain[1].parts(), ("backup", "other"));
    assert_eq!(config.chain(Role::Reviewer)[0].parts().1, "small");
    assert_eq!(config.max_output_tokens(Role::Architect), 16000);
    assert_eq!(config.max_output_tokens(Role::Reviewer), 8192);
    assert_eq!(config.budget.cost_usd, Some(2.5));
    assert_eq!(config.budget.tokens, Some(10_000_000));
    assert!((config.prices["large"].cost_usd(1_000_000, 100_000) - 2.0).abs() < 1e-9);

    assert!(config.resolve_keys(|_| None).is_err());
    config
        .resolve_keys(|name| (name == "OPENAI_API_KEY").then(|| "sk-canary".to_owned()))
        .unwrap();
    assert!(!format!("{config:?}").contains("canary"));
}

#[test]
fn the_environment_alone_is_a_configuration() {
    let env = |name: &str| match name {
        "OPENAI_BASE_URL" => Some("http://127.0.0.1:1/v1".to_owned()),
        "ARTEL_MODEL" => Some("m".to_owned()),
        "OPENAI_API_KEY" => Some("  ".to_owned()),
        _ => None,
    };
    let config = Config::from_env(env);
    config.validate().unwrap();
    assert!(config.is_complete());
    assert!(config.endpoints["default"].api_key.is_none());
    assert!(!Config::from_env(|_| None).is_complete());
}

#[test]
fn a_wrong_configuration_is_named_by_its_place() {
    for (change, place) in [
        ("temperature = 0.2", "temperature = 9.0"),
        ("endpoint = \"backup\"", "endpoint = \"nowhere\""),
        ("https://models.example/v1/", "models.example"),
        (
            "input_per_million_usd = 1.0",
            "input_per_million_usd = -1.0",
        ),
        ("tries = 3", "tries = 0"),
    ] {
        let config: Config = toml::from_str(&FULL.replace(change, place)).unwrap();
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains("models."), "{message}");
    }
    let unknown = FULL.replace("[budget]", "[budget]\ncost_eur = 1.0");
    assert!(toml::from_str::<Config>(&unknown).is_err());
}

#[test]
fn an_address_is_shown_without_its_credentials() {
    assert_eq!(
        without_credentials("https://me:pw@h.example/v1?key=x"),
        "https://h.example/v1"
    );
    let url = parse_base_url("d", "http://h:1/v1/chat/completions").unwrap();
    assert_eq!(url.as_str(), "http://h:1/v1");
}
