//! The process's limit of open descriptors.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What [`raise_fd_limit`] found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FdLimit {
    /// The soft limit that the process started with.
    pub before: u64,
    /// The soft limit now: as many descriptors may be open.
    pub now: u64,
}

/// Raises the soft limit of open descriptors as far as is allowed: to the hard limit, and with
/// `CAP_SYS_RESOURCE` beyond it to `at_least`. A proxied connection takes two descriptors and, in bulk, two
/// or four more for pipes.
///
/// # Errors
/// The limit can't be read or set. That it stays below `at_least` is no error; compare [`FdLimit::now`].
pub fn raise_fd_limit(at_least: u64) -> io::Result<FdLimit> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let goal = hard.max(at_least);
    if goal > hard && setrlimit(Resource::RLIMIT_NOFILE, goal, goal).is_ok() {
        return Ok(FdLimit { before: soft, now: goal });
    }
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(FdLimit { before: soft, now: hard })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let limit = raise_fd_limit(0).unwrap();
        assert_eq!(limit.now, hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, hard);
    }
}
