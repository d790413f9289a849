//! What this process takes of the machine.

use super::Failed;

/// The resident memory of this process, in bytes.
pub fn resident_bytes() -> Result<f64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kilobytes: u32 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .ok_or("/proc/self/status does not say VmRSS")?;
    Ok(f64::from(kilobytes) * 1024.0)
}
