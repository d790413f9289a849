//! The two programs that a spawner puts into a sandbox, under the same sub-commands as in `artel`:
//! `internal launch …` and `internal agent …`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let words = (args.next(), args.next());
    match (
        words.0.as_deref().and_then(|word| word.to_str()),
        words.1.as_deref().and_then(|word| word.to_str()),
    ) {
        (Some("internal"), Some("launch")) => sandbox::launcher::main(args),
        (Some("internal"), Some("agent")) => worker::main(args),
        _ => {
            eprintln!("usage: artel-inside internal launch|agent …");
            ExitCode::from(2)
        }
    }
}
