//! The programs that a spawner puts into a sandbox, under the same sub-commands as in `artel`: `internal launch …` and
//! `internal agent …`; and, for containers alone, `internal wait …`, which becomes the others when there is a job. Under the name `artel-agent`, as images have it too, it is the agent alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().map(PathBuf::from);
    if name.as_deref().and_then(Path::file_name) == Some("artel-agent".as_ref()) {
        return worker::main(args);
    }
    let words = (args.next(), args.next());
    match (
        words.0.as_deref().and_then(|word| word.to_str()),
        words.1.as_deref().and_then(|word| word.to_str()),
    ) {
        (Some("internal"), Some("launch")) => sandbox::launcher::main(args),
        (Some("internal"), Some("agent")) => worker::main(args),
        (Some("internal"), Some("wait")) => spawner::runtime::wait_for_go(args),
        _ => {
            eprintln!("usage: artel-inside internal launch|agent|wait …");
            ExitCode::from(2)
        }
    }
}
