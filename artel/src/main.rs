//! The program `artel`.

use std::process::ExitCode;

fn main() -> ExitCode {
    artel::main(std::env::args_os())
}
