//! Envoy's own rate-limit service, with a Redis behind it. The program is `github.com/envoyproxy/ratelimit/src/service_cmd`,
//! a Go module; `CULVERT_RATELIMIT_SERVICE` says where it was built. Without it the test says so and passes; with it
//! there has to be a Redis, too.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::net::TcpStream;

use crate::lab::{Lab, free, limits};

/// A program, until this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Option<Running> {
    let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    silent.spawn().ok().map(Running)
}

const CONFIGURATION: &str = "
domain: shop
descriptors:
- key: x-user
  descriptors:
  - key: path
    rate_limit: {unit: hour, requests_per_unit: 3}
";

#[tokio::test]
async fn envoys_rate_limit_service_counts_in_redis() {
    let Some(program) = std::env::var_os("CULVERT_RATELIMIT_SERVICE") else {
        eprintln!("skipped: CULVERT_RATELIMIT_SERVICE does not say where Envoy's rate-limit service is");
        return;
    };
    let (redis, grpc, http, debug) = (free(), free(), free(), free());
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("ratelimit/config");
    fs::create_dir_all(&config).unwrap();
    fs::write(config.join("shop.yaml"), CONFIGURATION).unwrap();
    let port = redis.port().to_string();
    let arguments = ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
    let _redis = start(Command::new("redis-server").args(arguments).current_dir(folder.path())).unwrap();
    wait(redis).await;
    let _service = start(
        Command::new(program)
            .env("USE_STATSD", "false")
            .env("REDIS_SOCKET_TYPE", "tcp")
            .env("REDIS_URL", redis.to_string())
            .env("RUNTIME_ROOT", folder.path())
            .env("RUNTIME_SUBDIRECTORY", "ratelimit")
            .env("RUNTIME_WATCH_ROOT", "false")
            .env("HOST", "127.0.0.1")
            .env("PORT", http.port().to_string())
            .env("GRPC_HOST", "127.0.0.1")
            .env("GRPC_PORT", grpc.port().to_string())
            .env("DEBUG_HOST", "127.0.0.1")
            .env("DEBUG_PORT", debug.port().to_string()),
    );
    wait(grpc).await;
    let spec = "
  headers: Legacy
  global: {service: authz.example, port: 80, domain: shop, timeout: 10s, onFailure: Deny}
  limits:
  - {name: each, by: [{type: Header, name: x-user}, {type: Path}], global: {}}
";
    let lab = Lab::with(grpc, http, &limits(spec)).await;
    for user in ["anna", "ben"] {
        for left in [2, 1, 0] {
            let (status, head, body) = lab.ask("GET", "/a", &[("x-user", user)], "").await;
            assert_eq!(status, 200, "{head} {body}");
            assert!(head.contains(&format!("x-ratelimit-remaining: {left}")), "{head}");
            assert!(head.contains("x-ratelimit-limit: 3, 3;w=3600;name=\"each\""), "{head}");
        }
        let (status, head, _) = lab.ask("GET", "/a", &[("x-user", user)], "").await;
        assert_eq!(status, 429, "{head}");
        assert!(head.contains("retry-after: ") && head.contains("x-envoy-ratelimited: true"), "{head}");
    }
    assert_eq!(lab.ask("GET", "/b", &[("x-user", "anna")], "").await.0, 200, "another path");
    assert_eq!(lab.ask("GET", "/a", &[], "").await.0, 200, "who has no name is not counted");
    assert_eq!(lab.guards.limits.stats().failed.get(), 0);
}

async fn wait(address: std::net::SocketAddr) {
    let begin = tokio::time::Instant::now();
    while TcpStream::connect(address).await.is_err() {
        assert!(begin.elapsed() < Duration::from_secs(60), "nobody listens at {address}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
