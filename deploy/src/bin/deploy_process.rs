//! The supervisor (`supervise …`) and the sandbox's launcher (`launch …`) as a program of their own.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("supervise") => deploy::supervisor::main(args),
        Some("launch") => sandbox::launcher::main(args),
        _ => {
            eprintln!("deploy-process: say `supervise` or `launch`");
            ExitCode::from(2)
        }
    }
}
