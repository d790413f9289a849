//! The configuration: environment, then `.env`, then `artel.toml`, then defaults.

mod error;
mod explain;
mod layers;
mod reader;
mod tables;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use figment::Figment;
use ports::Plaintext;

use self::layers::{Layer, home_folder, toml_layer};
use self::reader::{Reader, text_of};

pub use self::error::Error;

/// One process for everything, or a process for each part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything on this machine.
    Embedded,
    /// Servers for everything.
    Full,
}

/// A value that is never shown.
#[derive(Clone)]
pub struct SecretValue(std::sync::Arc<Plaintext>);

impl SecretValue {
    fn new(text: String) -> Self {
        Self(std::sync::Arc::new(Plaintext::new(text)))
    }

    /// The value, for the one place that hands it on.
    pub fn expose(&self) -> &str {
        self.0.expose()
    }
}

/// Who the spawner is for repositories on GitHub.
#[derive(Clone)]
pub enum GitHubLogin {
    /// Whoever a token belongs to.
    Token(SecretValue),
    /// An app: its id, and the file with its private key.
    App(String, PathBuf),
}

/// The configuration of this process.
#[derive(Clone)]
pub struct Config {
    /// The data folder.
    pub home: PathBuf,
    /// One process or many.
    pub mode: Mode,
    /// PostgreSQL instead of SQLite.
    pub database_url: Option<SecretValue>,
    /// The bus between processes, instead of one within this process.
    pub redis_url: Option<SecretValue>,
    /// The model endpoint, with `/v1`.
    pub openai_base_url: Option<String>,
    /// Its key.
    pub openai_api_key: Option<SecretValue>,
    /// The endpoint of agents that speak Anthropic's format, without `/v1`.
    pub anthropic_base_url: Option<String>,
    /// Its key.
    pub anthropic_api_key: Option<SecretValue>,
    /// The model's name there.
    pub anthropic_model: Option<String>,
    /// The model's name.
    pub model: Option<String>,
    /// `demo` or a file.
    pub tape: Option<String>,
    /// GitHub's API.
    pub github_api_url: String,
    /// Who the spawner is for its repositories.
    pub github: Option<GitHubLogin>,
    /// Telegram's token.
    pub telegram_bot_token: Option<SecretValue>,
    /// Telegram's server.
    pub telegram_api_url: String,
    /// Who is told about limits, money and failures.
    pub admin_chat_ids: Vec<i64>,
    /// Who may talk to the bot.
    pub allowed_users: Vec<i64>,
    /// An age identity instead of the one in the home folder.
    pub age_key: Option<SecretValue>,
    /// A file with it.
    pub age_key_file: Option<PathBuf>,
    /// How far back the steps of threads stay; absent: for ever.
    pub history: Option<Duration>,
    /// Coding workers at a time.
    pub max_workers: usize,
    /// `SPAWNER_WARM`.
    pub warm: usize,
    /// Cores that they may use together; none for what the machine has.
    pub worker_cpus: Option<f64>,
    /// Memory that they may use together, in MiB; none for what the machine has.
    pub worker_memory_mb: Option<u64>,
    /// How their workspaces are kept from growing beyond a job's limit.
    pub worker_disk: spawner::Disk,
    /// Where workers run: the runtime of the Docker engine; none for a sandbox on this machine. A process that is nothing but a
    /// spawner asks [`Config::of_spawner`].
    pub docker_runtime: Option<String>,
    /// The Docker engine for workers.
    pub docker_host: String,
    /// The image of workers in Docker.
    pub worker_image: String,
    /// The coding agent's adapter.
    pub agent: String,
    /// The command of the adapter `command`.
    pub agent_command: Vec<String>,
    /// The ports of deployed services, both included.
    pub ports: (u16, u16),
    /// Where `/health` answers.
    pub http_addr: SocketAddr,
    /// Where traces go.
    pub otlp_endpoint: Option<String>,
    /// What is logged.
    pub log_filter: String,
    /// Whether logs are JSON.
    pub log_json: bool,
    /// The files `artel.toml` that were read, the one that goes before the other first.
    files: Vec<PathBuf>,
    figment: Figment,
}

/// How addresses of Redis begin.
const REDIS: &[&str] = &[
    "redis://",
    "rediss://",
    "redis+unix://",
    "unix://",
    "redis+sentinel://",
    "redis+cluster://",
];

/// What a process is for, as far as it decides what has to be configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: it looks at the configuration itself.
    Nothing,
    /// A command, or everything at once.
    Data,
    /// One of the processes that share a database and a bus.
    Servers,
    /// The same, for Telegram.
    Bot,
    /// Workers, without a database.
    Bus,
}

/// Where workers run in the full size when nobody says anything.
const FULL_RUNTIME: &str = "sysbox-runc";
/// Tables of `artel.toml`.
const TABLES: &[&str] = &["models", "policy"];

impl Config {
    /// Reads the configuration. `folder` is where `.env` and `artel.toml` are looked for first, the current folder for
    /// the program.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let environment = Layer::environment()?;
        let local_dotenv = Layer::dotenv(&folder.join(".env"))?;
        let local_toml = toml_layer(&folder.join("artel.toml"))?;

        // Where the data folder is decides where the rest of the files are, so it is read first.
        let mut early = Figment::new();
        if let Some(layer) = &local_toml {
            early = early.merge(layer);
        }
        if let Some(layer) = &local_dotenv {
            early = early.merge(layer);
        }
        early = early.merge(&environment);
        let home = match early.find_value("artel_home") {
            Ok(value) => PathBuf::from(text_of(&value)),
            Err(_) => home_folder()?,
        };
        let home = if home.is_absolute() {
            home
        } else {
            folder.join(home)
        };

        let mut figment = Figment::from(Layer::defaults());
        for layer in [toml_layer(&home.join("artel.toml"))?, local_toml]
            .into_iter()
            .flatten()
        {
            figment = figment.merge(layer);
        }
        for layer in [Layer::dotenv(&home.join(".env"))?, local_dotenv]
            .into_iter()
            .flatten()
        {
            figment = figment.merge(layer);
        }
        figment = figment.merge(environment);
        let files = [folder, home.as_path()]
            .map(|folder| folder.join("artel.toml"))
            .into_iter()
            .filter(|file| file.is_file())
            .collect();

        let reader = Reader { figment: &figment };
        let mode = reader.parse(
            "ARTEL_MODE",
            "`embedded` or `full` is expected",
            |text| match text {
                "embedded" => Some(Mode::Embedded),
                "full" => Some(Mode::Full),
                _ => None,
            },
        )?;
        let config =
            Self {
                mode,
                database_url: reader.parse_opt(
                    "DATABASE_URL",
                    "an address like postgres://user:password@host/name is expected",
                    |text| {
                        (text.starts_with("postgres://") || text.starts_with("postgresql://"))
                            .then(|| SecretValue::new(text.to_owned()))
                    },
                )?,
                redis_url: reader.parse_opt(
                    "REDIS_URL",
                    "an address like redis://host:6379/0, redis+sentinel://host,host/master or redis+cluster://host,host is \
                     expected",
                    |text| {
                        REDIS
                            .iter()
                            .any(|scheme| text.starts_with(scheme))
                            .then(|| SecretValue::new(text.to_owned()))
                    },
                )?,
                openai_base_url: reader.url("OPENAI_BASE_URL")?,
                openai_api_key: reader.secret("OPENAI_API_KEY"),
                anthropic_base_url: reader.url("ANTHROPIC_BASE_URL")?,
                anthropic_api_key: reader.secret("ANTHROPIC_API_KEY"),
                anthropic_model: reader.text("ANTHROPIC_MODEL"),
                model: reader.text("ARTEL_MODEL"),
                tape: reader.text("ARTEL_TAPE"),
                github_api_url: reader.url("GITHUB_API_URL")?.unwrap_or_default(),
                github: github(&reader)?,
                telegram_bot_token: reader.secret("TELEGRAM_BOT_TOKEN"),
                telegram_api_url: reader.url("TELEGRAM_API_URL")?.unwrap_or_default(),
                admin_chat_ids: reader.numbers("ADMIN_CHAT_IDS")?,
                allowed_users: reader.numbers("ALLOWED_USERS")?,
                age_key: reader.secret("SOPS_AGE_KEY"),
                age_key_file: reader.text("SOPS_AGE_KEY_FILE").map(PathBuf::from),
                history: reader.parse(
                    "ARTEL_HISTORY",
                    "a number of hours or days like 36h or 30d is expected, or `forever`",
                    history,
                )?,
                max_workers: reader.parse(
                    "SPAWNER_MAX_WORKERS",
                    "a number from 1 to 64 is expected",
                    |text| text.parse().ok().filter(|n| (1..=64).contains(n)),
                )?,
                warm: reader.parse(
                    "SPAWNER_WARM",
                    "a number from 0 to 16 is expected",
                    |text| text.parse().ok().filter(|n| (0..=16).contains(n)),
                )?,
                worker_cpus: reader.parse_opt(
                    "SPAWNER_CPUS",
                    "a number of cores from 0.1 to 4096 is expected",
                    |text| text.parse().ok().filter(|n| (0.1..=4096.0).contains(n)),
                )?,
                worker_memory_mb: reader.parse_opt(
                    "SPAWNER_MEMORY_MB",
                    "a number of MiB from 64 to 67108864 is expected",
                    |text| text.parse().ok().filter(|n| (64..=67_108_864).contains(n)),
                )?,
                worker_disk: reader.parse(
                    "SPAWNER_DISK",
                    "`auto`, `loop` or `polled` is expected",
                    |text| match text {
                        "auto" => Some(spawner::Disk::Auto),
                        "loop" => Some(spawner::Disk::Loop),
                        "polled" => Some(spawner::Disk::Polled),
                        _ => None,
                    },
                )?,
                docker_runtime: reader
                    .parse_opt(
                        "SPAWNER_RUNTIME",
                        "`bubblewrap`, `sysbox-runc`, `runc`, `runsc` or `kata` is expected",
                        |text| match text {
                            "bubblewrap" => Some(None),
                            "sysbox-runc" | "runc" | "runsc" | "kata" => {
                                Some(Some(text.to_owned()))
                            }
                            _ => None,
                        },
                    )?
                    .unwrap_or_else(|| (mode == Mode::Full).then(|| FULL_RUNTIME.to_owned())),
                docker_host: reader.text("DOCKER_HOST").unwrap_or_default(),
                worker_image: reader.text("WORKER_IMAGE").unwrap_or_default(),
                agent: reader.parse(
                    "ARTEL_AGENT",
                    "the name of an agent is expected; docs/agents.md lists them",
                    |text| {
                        let known = ["artel-agent", "command"].contains(&text)
                            || worker::adapters::named(text).is_some();
                        known.then(|| text.to_owned())
                    },
                )?,
                agent_command: reader
                    .parse_opt(
                        "ARTEL_AGENT_COMMAND",
                        "a JSON array of texts is expected, such as [\"my-agent\"]",
                        |text| {
                            serde_json::from_str::<Vec<String>>(text)
                                .ok()
                                .filter(|argv| !argv.is_empty())
                        },
                    )?
                    .unwrap_or_default(),
                ports: reader.parse(
                    "ARTEL_PORTS",
                    "a range like 20000-29999 is expected",
                    |text| {
                        let (low, high) = text.split_once('-')?;
                        let range = (low.trim().parse().ok()?, high.trim().parse().ok()?);
                        (1024 <= range.0 && range.0 <= range.1).then_some(range)
                    },
                )?,
                http_addr: reader.parse(
                    "ARTEL_HTTP_ADDR",
                    "an address like 127.0.0.1:8642 is expected",
                    |text| SocketAddr::from_str(text).ok(),
                )?,
                otlp_endpoint: reader.url("OTEL_EXPORTER_OTLP_ENDPOINT")?,
                log_filter: reader.text("RUST_LOG").unwrap_or_default(),
                log_json: reader.parse("ARTEL_LOG", "`text` or `json` is expected", |text| {
                    match text {
                        "text" => Some(false),
                        "json" => Some(true),
                        _ => None,
                    }
                })?,
                home,
                files,
                figment: figment.clone(),
            };
        config.policy()?;
        config.table::<models::Config>("models")?;
        if config.agent == "command" && config.agent_command.is_empty() {
            return Err(reader.error(
                "ARTEL_AGENT",
                "then ARTEL_AGENT_COMMAND has to name the command",
            ));
        }
        Ok(config)
    }

    /// Says what is missing for what this process is for, all of it at once. With `ARTEL_MODE=full`, what would be embedded
    /// counts as missing.
    pub fn fits(&self, need: Need) -> Result<(), Error> {
        let full = self.mode == Mode::Full;
        let servers = matches!(need, Need::Servers | Need::Bot) || full && need == Need::Data;
        let mut missing = Vec::new();
        if self.database_url.is_none() && servers {
            missing.push("DATABASE_URL, a PostgreSQL database");
        }
        if self.redis_url.is_none() && (servers || need == Need::Bus) {
            missing.push("REDIS_URL, the bus between the processes");
        }
        if self.telegram_bot_token.is_none() && need == Need::Bot {
            missing.push("TELEGRAM_BOT_TOKEN, the bot's token");
        }
        // The demo tape is never played by surprise where people expect a model.
        if full && need != Need::Nothing && !self.names_an_answerer()? {
            missing.push(
                "a model (OPENAI_BASE_URL, OPENAI_API_KEY, ARTEL_MODEL, or [models] in artel.toml) or ARTEL_TAPE",
            );
        }
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join("; ");
        Err(if full {
            Error::NotFull(missing)
        } else {
            Error::Missing(format!(
                "this process works with others on servers, and these are not set: {missing}; `artel up` needs none of them"
            ))
        })
    }

    /// Whether it is said who answers: a model, or a tape.
    fn names_an_answerer(&self) -> Result<bool, Error> {
        Ok(self.tape.is_some()
            || self.openai_base_url.is_some()
            || !self.table::<models::Config>("models")?.endpoints.is_empty())
    }

    /// The same for a process that is nothing but a spawner: it is of the full size, whatever `ARTEL_MODE` says.
    pub fn of_spawner(&self) -> Self {
        let mut config = self.clone();
        if self.is_default("SPAWNER_RUNTIME") {
            config.docker_runtime = Some(FULL_RUNTIME.to_owned());
        }
        config
    }

    /// Whether a setting has a value that nobody chose.
    pub fn is_default(&self, name: &str) -> bool {
        let reader = Reader {
            figment: &self.figment,
        };
        reader.source(name) == "default"
    }
}

/// A time such as `30d`, at least an hour; or for ever. The inner one is absent for that.
#[allow(
    clippy::option_option,
    reason = "the outer one says whether it is a time"
)]
fn history(text: &str) -> Option<Option<Duration>> {
    if text == "forever" {
        return Some(None);
    }
    let hours = match text.strip_suffix('d') {
        Some(days) => days.trim().parse::<u64>().ok()?.checked_mul(24)?,
        None => text.strip_suffix('h')?.trim().parse().ok()?,
    };
    let sane = (1..=24 * 36_500).contains(&hours);
    sane.then(|| Some(Duration::from_hours(hours)))
}

/// A token, or an app, and never both: it would not be known who comes.
fn github(reader: &Reader<'_>) -> Result<Option<GitHubLogin>, Error> {
    let token = reader.secret("GITHUB_TOKEN");
    let app = reader.parse_opt(
        "GITHUB_APP_ID",
        "the id of a GitHub App is expected: a number, or its client id Iv…",
        |id| spawner::GitHubApp::is_id(id).then(|| id.to_owned()),
    )?;
    let key = reader
        .text("GITHUB_APP_PRIVATE_KEY_FILE")
        .map(PathBuf::from);
    let refused = |name: &str, expected: &str| Err(reader.error(name, expected));
    match (token, app, key) {
        (Some(_), Some(_), _) => refused(
            "GITHUB_APP_ID",
            "GITHUB_TOKEN is set as well: take one of them away",
        ),
        (None, Some(id), Some(key)) => Ok(Some(GitHubLogin::App(id, key))),
        (None, Some(_), None) => refused(
            "GITHUB_APP_ID",
            "the app's private key is missing: name its file in GITHUB_APP_PRIVATE_KEY_FILE",
        ),
        // Like any other file of a secret, one in which nothing stands is as good as none.
        (_, None, Some(key)) if std::fs::metadata(&key).is_ok_and(|file| file.len() > 0) => {
            refused(
                "GITHUB_APP_PRIVATE_KEY_FILE",
                "the app's id is missing: set GITHUB_APP_ID, or take the key away",
            )
        }
        (token, None, _) => Ok(token.map(GitHubLogin::Token)),
    }
}
