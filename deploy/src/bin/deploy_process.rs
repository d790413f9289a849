//! The supervisor (`supervise …`), the sandbox's launcher (`launch …`) and one order, as JSON of a
//! [`ports::DeployRequest`] (`order HOME JSON`), as a program of their own, which tests can kill.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use deploy::{LocalDeployer, Options};
use ports::{Deployer, Failure, Plaintext, SecretHandle, SecretResolver};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("supervise") => deploy::supervisor::main(args),
        Some("launch") => sandbox::launcher::main(args),
        Some("order") => order(args),
        _ => {
            eprintln!("deploy-process: say `supervise`, `launch` or `order`");
            ExitCode::from(2)
        }
    }
}

fn order(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let home = args.next().unwrap_or_default();
    let text = args.next().unwrap_or_default();
    let carried_out = serde_json::from_slice(text.as_encoded_bytes())
        .map_err(|error| error.to_string())
        .and_then(|request| {
            let deployer = LocalDeployer::new(Options {
                home: home.into(),
                sandbox: sandbox::Sandbox::detect().map_err(|error| error.to_string())?,
                program: std::env::current_exe().map_err(|error| error.to_string())?,
                supervise_args: vec!["supervise".into()],
                launch_args: vec!["launch".into()],
                secrets: Arc::new(NoSecrets),
                ready_s: 10,
            });
            let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
            runtime
                .block_on(deployer.deploy(&request))
                .map_err(|failure| failure.to_string())
        });
    match carried_out {
        Ok(deployment) => {
            println!("{deployment:?}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("deploy-process: {message}");
            ExitCode::FAILURE
        }
    }
}

struct NoSecrets;

#[async_trait::async_trait]
impl SecretResolver for NoSecrets {
    async fn resolve(&self, handle: &SecretHandle, _: &str) -> ports::Result<Plaintext> {
        let message = format!("{handle} cannot be resolved here");
        Err(Failure::new("secret_missing", message))
    }
}
