//! The program `spawner`: `artel spawner` under a name of its own, for hosts that run workers and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    artel::spawner(std::env::args_os())
}
