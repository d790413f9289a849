//! The settings that have a name in the environment: one table from which the configuration is read, explained
//! (`artel config check`) and documented (`.env.example`).

/// A setting with a name of its own in the environment. In `artel.toml` it is the same name in lower case.
pub struct Setting {
    /// The name in the environment.
    pub name: &'static str,
    /// What it is, in a line or two.
    pub about: &'static str,
    /// What holds when nobody says anything; empty for nothing.
    pub default: &'static str,
    /// Whether the value is never shown.
    pub secret: bool,
}

const fn setting(name: &'static str, default: &'static str, about: &'static str) -> Setting {
    Setting {
        name,
        about,
        default,
        secret: false,
    }
}

const fn secret(name: &'static str, about: &'static str) -> Setting {
    Setting {
        name,
        about,
        default: "",
        secret: true,
    }
}

/// Headings of `.env.example` with the settings below them.
pub const GROUPS: &[(&str, &[Setting])] = &[
    (
        "Where things are",
        &[
            setting(
                "ARTEL_HOME",
                "",
                "The data folder: database, repositories, releases, identity. Default: $XDG_DATA_HOME/artel or ~/.local/share/artel.",
            ),
            setting(
                "ARTEL_MODE",
                "embedded",
                "`embedded` (one process, everything on this machine) or `full` (refuses anything embedded and says what is missing).",
            ),
            Setting {
                name: "DATABASE_URL",
                about: "A PostgreSQL database, postgres://user:password@host/name. Without it: SQLite in ARTEL_HOME.",
                default: "",
                secret: true,
            },
            secret(
                "REDIS_URL",
                "Redis (7 or newer) as the bus between processes: redis://host:6379/0, redis+sentinel://host,host/master, redis+cluster://host,host. Without it: in process. Needs DATABASE_URL.",
            ),
            setting(
                "ARTEL_HISTORY",
                "30d",
                "How far back the steps of threads stay, and the keys by which news that comes twice is known: a number with `h` or `d`, such as 30d, or `forever`. The newest hundred steps of each thread stay in any case; so does where it stands, and all that was said.",
            ),
        ],
    ),
    (
        "A model (any OpenAI-compatible endpoint)",
        &[
            setting("OPENAI_BASE_URL", "", "The endpoint, with /v1."),
            secret(
                "OPENAI_API_KEY",
                "Its key. Self-hosted servers often take any text.",
            ),
            setting(
                "ARTEL_MODEL",
                "",
                "The model's name there; needed when the endpoint has more than one. Roles, prices and budgets are tables in artel.toml.",
            ),
            setting(
                "ANTHROPIC_BASE_URL",
                "",
                "For agents that speak Anthropic's Messages (claude-code): the endpoint, without /v1. Default, with a key: https://api.anthropic.com.",
            ),
            secret(
                "ANTHROPIC_API_KEY",
                "Its key. Workers never see it; the broker puts it in.",
            ),
            setting(
                "ANTHROPIC_MODEL",
                "",
                "The model's name there. Default: the developer's model, which is ARTEL_MODEL if artel.toml says no more.",
            ),
            setting(
                "ARTEL_TAPE",
                "",
                "`demo` or a file: recorded answers instead of a model. Without a model the demo tape is used.",
            ),
        ],
    ),
    (
        "Repositories elsewhere",
        &[
            setting(
                "GITHUB_API_URL",
                "https://api.github.com",
                "GitHub's API, or that of a server of one's own (https://HOST/api/v3); credentials go to repositories on that host only.",
            ),
            secret(
                "GITHUB_TOKEN",
                "A token that may read and write them. Workers never see it: the spawner clones before they start and pushes after they end.",
            ),
            setting(
                "GITHUB_APP_ID",
                "",
                "Instead of a token, a GitHub App that is installed for them with the permission `contents: write`: its id, or its client id. The spawner asks for a token for each repository, which holds for an hour.",
            ),
            setting(
                "GITHUB_APP_PRIVATE_KEY_FILE",
                "",
                "The file with the app's private key, as GitHub gives it.",
            ),
        ],
    ),
    (
        "Telegram",
        &[
            secret(
                "TELEGRAM_BOT_TOKEN",
                "The bot's token; without one there is no Telegram.",
            ),
            setting(
                "TELEGRAM_API_URL",
                "https://api.telegram.org",
                "A self-hosted Bot API server.",
            ),
            setting(
                "ADMIN_CHAT_IDS",
                "",
                "Numeric chat ids, separated by commas: who is told about limits, money and failures.",
            ),
            setting(
                "ALLOWED_USERS",
                "",
                "Numeric user ids, separated by commas. Empty: only admins, and whoever enters the pairing code that the terminal shows.",
            ),
        ],
    ),
    (
        "Secrets",
        &[
            secret(
                "SOPS_AGE_KEY",
                "The age identity of the vault, instead of the one in ARTEL_HOME.",
            ),
            setting("SOPS_AGE_KEY_FILE", "", "A file with that identity."),
        ],
    ),
    (
        "Workers and deploys",
        &[
            setting(
                "SPAWNER_MAX_WORKERS",
                "4",
                "Coding workers at a time on this machine.",
            ),
            setting(
                "SPAWNER_WARM",
                "0",
                "Containers that are kept ready for the next tasks, from 0 to 16, where workers run in Docker; a task whose limits are not those of the table `policy` gets one of its own.",
            ),
            setting(
                "SPAWNER_CPUS",
                "",
                "Cores that their limits may come to together; a task that needs more waits for another spawner. Empty: four times the cores of this machine, because workers mostly wait for their models.",
            ),
            setting(
                "SPAWNER_MEMORY_MB",
                "",
                "Memory that their limits may come to together, in MiB. Empty: the memory of this machine.",
            ),
            setting(
                "SPAWNER_DISK",
                "auto",
                "How a workspace is kept from growing beyond its job's limit: `loop` (each is a disk of its own: an image of that size, on a loop device; needs root), `polled` (its size is looked at), or `auto`: `loop` for workers in Docker where it can be had, else `polled`.",
            ),
            setting(
                "SPAWNER_RUNTIME",
                "",
                "Where they run: `bubblewrap` (a sandbox on this machine), or in Docker with the runtime `sysbox-runc` (docs/sysbox.md), `runc`, `runsc` or `kata`. Default: `bubblewrap`; in the full size (ARTEL_MODE=full, and for `artel spawner`) `sysbox-runc`.",
            ),
            setting(
                "DOCKER_HOST",
                "unix:///var/run/docker.sock",
                "The Docker engine for workers: a Unix socket, because workspaces are folders of this machine.",
            ),
            setting(
                "WORKER_IMAGE",
                "artel-worker:dev",
                "The image of workers in Docker, which `make image` builds. One that is not here is pulled if it is pinned by digest, NAME@sha256:….",
            ),
            setting(
                "ARTEL_AGENT",
                "artel-agent",
                "The coding agent: `artel-agent`, `command`, `aider`, `claude-code`, `codex`, `droid`, `gemini` or `opencode`.",
            ),
            setting(
                "ARTEL_AGENT_COMMAND",
                "",
                "For the agent `command`: program and arguments as a JSON array, such as [\"my-agent\", \"--quiet\"].",
            ),
            setting(
                "ARTEL_PORTS",
                "20000-29999",
                "The range from which deployed services get their ports.",
            ),
        ],
    ),
    (
        "Watching it",
        &[
            setting(
                "ARTEL_HTTP_ADDR",
                "127.0.0.1:8642",
                "Where `artel up`, `runner`, `scheduler`, `bot` and `spawner` answer /health.",
            ),
            setting(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "",
                "Where traces go, by OTLP over HTTP, such as http://127.0.0.1:4318.",
            ),
            setting(
                "RUST_LOG",
                "",
                "What is logged, as tracing's filters are written. Default: info for `artel up`, warn for other commands.",
            ),
            setting("ARTEL_LOG", "text", "How it is logged: `text` or `json`."),
        ],
    ),
];

/// Every setting.
pub fn all() -> impl Iterator<Item = &'static Setting> {
    GROUPS.iter().flat_map(|(_, settings)| settings.iter())
}

/// The text of `.env.example`.
#[cfg(test)]
fn env_example() -> String {
    use std::fmt::Write as _;
    let mut out = String::from(
        "# Every variable that Artel knows. All are optional: with none, `make demo` works.\n\
         # A secret can stand in a file instead: NAME_FILE names it, such as DATABASE_URL_FILE=/run/secrets/database_url.\n\
         # Order: environment, then .env (here, then in ARTEL_HOME), then artel.toml (likewise), then the default.\n\
         # `artel config check` says for every value where it came from.\n",
    );
    for (heading, settings) in GROUPS {
        let _ = writeln!(out, "\n## {heading}");
        for Setting {
            name,
            about,
            default,
            ..
        } in *settings
        {
            let _ = writeln!(out, "# {about}\n# {name}={default}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_example_in_the_repository_names_every_setting() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../.env.example");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, super::env_example()).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            super::env_example(),
            "run this test with UPDATE=1 to write .env.example anew"
        );
    }
}
