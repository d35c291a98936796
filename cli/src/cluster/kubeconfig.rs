//! Which cluster, and as whom: kubectl's global flags over the files that kubectl reads, by the same rules (client-go's
//! `tools/clientcmd`). Where they are stricter than those of the `kube` crate, they are these: a file of `$KUBECONFIG` that is
//! missing is left out, a name on the command line that no file has is an error, and a broken file never means the cluster of
//! the pod that the command runs in.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use http::{HeaderName, HeaderValue};
use kube::Config;
use kube::config::{
    AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, KubeconfigError, NamedAuthInfo, NamedCluster,
    NamedContext,
};

/// What a pod has of its cluster.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The name of what was chosen.
const CHOSEN: &str = "chosen";
/// Where names are listed.
const NEXT: &str = "kubectl config get-contexts lists those there are";

/// Which cluster, in kubectl's words.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Which cluster, and as whom")]
pub struct ClusterArgs {
    /// The kubeconfig file [default: $KUBECONFIG, ~/.kube/config, or this pod's service account]
    #[arg(long, value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
    /// Another cluster of the kubeconfig than the context's
    #[arg(id = "cluster_name", long = "cluster", value_name = "NAME", global = true)]
    pub cluster: Option<String>,
    /// Another user of the kubeconfig than the context's
    #[arg(id = "user_name", long = "user", value_name = "NAME", global = true)]
    pub user: Option<String>,
    /// Who to act as; system:serviceaccount:NAMESPACE:NAME for a service account
    #[arg(id = "act_as", long = "as", value_name = "USER", global = true)]
    pub act_as: Option<String>,
    /// A group to act as, beside --as; may be given more than once
    #[arg(id = "act_as_group", long = "as-group", value_name = "GROUP", global = true)]
    pub act_as_group: Vec<String>,
    /// The UID to act as, beside --as
    #[arg(id = "act_as_uid", long = "as-uid", value_name = "UID", global = true)]
    pub act_as_uid: Option<String>,
    /// The address of the API server, in the place of the cluster's
    #[arg(id = "api_server", short = 's', long = "server", value_name = "URL", global = true)]
    pub server: Option<String>,
    /// A bearer token, in the place of the user's credentials
    #[arg(id = "api_token", long = "token", value_name = "TOKEN", global = true)]
    pub token: Option<String>,
    /// A file with the certificates of the authorities that the API server is known by
    #[arg(long, value_name = "FILE", global = true)]
    pub certificate_authority: Option<PathBuf>,
    /// Do not check who the API server is: whoever is on the way can read and change everything
    #[arg(
        long,
        global = true,
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value = "false",
        hide_default_value = true,
        value_name = "true|false",
        hide_possible_values = true
    )]
    pub insecure_skip_tls_verify: bool,
    /// The name that is to stand in the API server's certificate
    #[arg(long, value_name = "NAME", global = true)]
    pub tls_server_name: Option<String>,
    /// A file with the certificate to show to the API server
    #[arg(id = "api_certificate", long = "client-certificate", value_name = "FILE", global = true)]
    pub client_certificate: Option<PathBuf>,
    /// A file with its key
    #[arg(id = "api_key", long = "client-key", value_name = "FILE", global = true)]
    pub client_key: Option<PathBuf>,
    /// How long an answer of the API server may take, such as 5s or 1m; 0 is the default, 30s
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = request_timeout, hide_default_value = true, global = true)]
    pub request_timeout: Duration,
    /// The namespace that the mesh is installed in
    #[arg(
        long,
        env = "CULVERT_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = "culvert-system",
        global = true
    )]
    pub system_namespace: String,
}

/// As kubectl reads it: a number without a unit is of seconds.
fn request_timeout(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => crate::install::duration(text),
    }
}

impl ClusterArgs {
    /// Whether a cluster was named, or there is a usual one.
    pub fn is_any(&self) -> bool {
        let file = || std::env::home_dir().is_some_and(|home| home.join(".kube/config").is_file());
        self.kubeconfig.is_some()
            || self.is_said()
            || std::env::var_os("KUBECONFIG").is_some_and(|v| !v.is_empty())
            || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
            || file()
    }

    /// Whether the command line names anything that is to be in a file, or a server.
    fn is_said(&self) -> bool {
        [&self.context, &self.cluster, &self.user, &self.server].iter().any(|said| said.is_some())
    }

    /// What the client is made of.
    ///
    /// # Errors
    /// A file can't be read, or what is named is in none.
    pub(super) async fn config(&self) -> Result<Config> {
        let chosen = self.chosen(&self.files()?)?;
        let user = chosen.auth_infos.first().and_then(|named| named.auth_info.as_ref());
        let headers = user.map(more_of_whom_to_act_as).transpose()?.unwrap_or_default();
        let made = Config::from_custom_kubeconfig(chosen, &KubeConfigOptions::default()).await;
        let mut config = made.with_context(|| format!("the kubeconfig can't be used ({NEXT})"))?;
        config.headers = headers;
        Ok(config)
    }

    /// The files, merged; where they have nothing, and nothing is named, what this pod has.
    ///
    /// # Errors
    /// One of them can't be read, or there is none at all.
    fn files(&self) -> Result<Kubeconfig> {
        let all = match &self.kubeconfig {
            Some(path) => read(path).with_context(|| format!("cannot use {}", path.display()))?,
            None => merged(&self.list())?,
        };
        let is_empty = all.clusters.is_empty() && all.contexts.is_empty() && all.auth_infos.is_empty();
        if !is_empty || self.is_said() {
            return Ok(all);
        }
        of_pod(Path::new(ACCOUNT)).ok_or_else(|| {
            anyhow!(
                "which cluster? Name a kubeconfig with --kubeconfig or $KUBECONFIG, or a server with -s; there is no context in \
                 those there are, and this is no pod with a service account"
            )
        })
    }

    /// What of `all` is meant, with what the command line says in its place: a file of one context.
    ///
    /// # Errors
    /// What is named is not there, or makes no sense.
    fn chosen(&self, all: &Kubeconfig) -> Result<Kubeconfig> {
        let mut context = self.context_of(all)?;
        let wanted = self.cluster.as_ref().unwrap_or(&context.cluster);
        let found = all.clusters.iter().find(|named| named.name == *wanted);
        if found.is_none() && self.cluster.is_some() {
            bail!("there is no cluster {wanted} in the kubeconfig; kubectl config get-clusters lists them");
        }
        let cluster = found.and_then(|named| named.cluster.clone()).unwrap_or_default();
        let wanted = self.user.as_ref().or(context.user.as_ref());
        let found = wanted.and_then(|name| all.auth_infos.iter().find(|named| named.name == *name));
        if let (None, Some(name)) = (found, &self.user) {
            bail!("there is no user {name} in the kubeconfig; kubectl config get-users lists them");
        }
        let cluster = self.with_server(cluster)?;
        let user = self.with_credentials(found.and_then(|named| named.auth_info.clone()).unwrap_or_default());
        let groups = user.impersonate_groups.as_ref().is_some_and(|groups| !groups.is_empty());
        if user.impersonate.is_none() && (groups || user.impersonate_uid.is_some()) {
            bail!("--as-group and --as-uid say more of the user that --as names; name it");
        }
        // Without TLS anybody could read them.
        // As whoever connects reads it: a scheme has no case (RFC 3986 section 3.1).
        let scheme = cluster.server.as_ref().and_then(|url| url.get(.."http://".len()));
        let is_plain = scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://"));
        let user = if is_plain { without_credentials(user) } else { user };
        context = Context {
            cluster: CHOSEN.to_owned(),
            user: Some(CHOSEN.to_owned()),
            namespace: context.namespace.filter(|namespace| !namespace.is_empty()),
            ..Context::default()
        };
        Ok(of_one(cluster, user, context))
    }

    fn context_of(&self, all: &Kubeconfig) -> Result<Context> {
        let Some(name) = self.context.as_ref().or(all.current_context.as_ref()) else {
            return Ok(Context::default());
        };
        let found = all.contexts.iter().find(|named| named.name == *name);
        let found = found.with_context(|| format!("there is no context: {name} ({NEXT})"))?;
        Ok(found.context.clone().unwrap_or_default())
    }

    /// Whether any of the files is there.
    pub fn has_files(&self) -> bool {
        self.list().iter().any(|path| path.is_file())
    }

    /// For a program that knows files and contexts, and no other cluster or user than a context's: a file with a context of this
    /// name, for the head of `$KUBECONFIG`, and what else is to stand there. It has names, and no secret but a token that is given:
    /// beside the credentials of the context's user it would not count. `None` where none are given.
    ///
    /// # Errors
    /// The files can't be read, or have no such context.
    pub fn as_a_context(&self, name: &str) -> Result<Option<(String, OsString)>> {
        let token = self.token.as_ref().filter(|_| self.has_files());
        if self.cluster.is_none() && self.user.is_none() && token.is_none() {
            return Ok(None);
        }
        let all = self.files()?;
        let mut context = self.context_of(&all)?;
        if let Some(cluster) = &self.cluster {
            context.cluster.clone_from(cluster);
        }
        if self.user.is_some() {
            context.user.clone_from(&self.user);
        }
        let mut file = Kubeconfig::default();
        if let Some(token) = token {
            let of_context = context.user.replace(name.to_owned());
            let user = all.auth_infos.into_iter().find(|named| Some(&named.name) == of_context.as_ref());
            let user = without_credentials(user.and_then(|named| named.auth_info).unwrap_or_default());
            let user = AuthInfo { token: Some(token.clone().into()), ..user };
            file.auth_infos.push(NamedAuthInfo {
                name: name.to_owned(),
                auth_info: Some(user),
                ..NamedAuthInfo::default()
            });
        }
        let named = NamedContext { name: name.to_owned(), context: Some(context), ..NamedContext::default() };
        file.contexts.push(named);
        Ok(Some((serde_json::to_string(&file)?, std::env::join_paths(self.list())?)))
    }

    /// The files that are read, in their order.
    fn list(&self) -> Vec<PathBuf> {
        if let Some(path) = &self.kubeconfig {
            return vec![path.clone()];
        }
        match std::env::var_os("KUBECONFIG").filter(|list| !list.is_empty()) {
            Some(list) => std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect(),
            None => std::env::home_dir().map(|home| home.join(".kube/config")).into_iter().collect(),
        }
    }

    fn with_server(&self, mut cluster: Cluster) -> Result<Cluster> {
        if self.server.is_some() || self.tls_server_name.is_some() {
            // A name that was for another server is none of this one's.
            cluster.tls_server_name.clone_from(&self.tls_server_name);
        }
        if self.insecure_skip_tls_verify || self.certificate_authority.is_some() {
            if self.insecure_skip_tls_verify && self.certificate_authority.is_some() {
                bail!(
                    "--certificate-authority says who the server is to be known by, and --insecure-skip-tls-verify not to look"
                );
            }
            cluster.insecure_skip_tls_verify = Some(self.insecure_skip_tls_verify);
            cluster.certificate_authority_data = None;
            cluster.certificate_authority =
                self.certificate_authority.as_ref().map(|path| path.display().to_string());
        }
        if let Some(server) = &self.server {
            cluster.server = Some(server.clone());
        }
        // Without a scheme, as client-go completes it.
        let is_tls = cluster.insecure_skip_tls_verify == Some(true)
            || cluster.certificate_authority.is_some()
            || cluster.certificate_authority_data.is_some()
            || self.client_certificate.is_some();
        if let Some(server) = cluster.server.as_mut().filter(|s| !s.is_empty() && !s.contains("://")) {
            server.insert_str(0, if is_tls { "https://" } else { "http://" });
        }
        if cluster.server.as_ref().is_none_or(String::is_empty) {
            bail!(
                "which cluster? No server is named by the kubeconfig: choose a context with --context, or a server with -s ({NEXT})"
            );
        }
        Ok(cluster)
    }

    fn with_credentials(&self, mut user: AuthInfo) -> AuthInfo {
        if let Some(token) = &self.token {
            user = without_credentials(user);
            user.token = Some(token.clone().into());
        }
        if let Some(path) = &self.client_certificate {
            user.client_certificate = Some(path.display().to_string());
            user.client_certificate_data = None;
        }
        if let Some(path) = &self.client_key {
            user.client_key = Some(path.display().to_string());
            user.client_key_data = None;
        }
        // The name alone: with it goes what the file says of groups and the rest, to kubectl and to Helm too.
        if self.act_as.is_some() {
            user.impersonate.clone_from(&self.act_as);
        }
        if !self.act_as_group.is_empty() {
            user.impersonate_groups = Some(self.act_as_group.clone());
        }
        if self.act_as_uid.is_some() {
            user.impersonate_uid.clone_from(&self.act_as_uid);
        }
        user
    }
}

/// Whom to act as, and nothing else.
fn without_credentials(user: AuthInfo) -> AuthInfo {
    AuthInfo {
        impersonate: user.impersonate,
        impersonate_uid: user.impersonate_uid,
        impersonate_groups: user.impersonate_groups,
        impersonate_user_extra: user.impersonate_user_extra,
        ..AuthInfo::default()
    }
}

/// The headers for what the `kube` crate reads and does not send.
fn more_of_whom_to_act_as(user: &AuthInfo) -> Result<Vec<(HeaderName, HeaderValue)>> {
    let mut headers = Vec::new();
    if let Some(uid) = &user.impersonate_uid {
        headers.push((HeaderName::from_static("impersonate-uid"), HeaderValue::from_str(uid)?));
    }
    for (key, values) in user.impersonate_user_extra.iter().flatten() {
        let name = HeaderName::from_bytes(format!("impersonate-extra-{}", escaped(key)).as_bytes())?;
        for value in values {
            headers.push((name.clone(), HeaderValue::from_str(value)?));
        }
    }
    Ok(headers)
}

/// A key as it may stand in a header's name: RFC 9110 section 5.6.2 has what may, the rest and `%` are escaped.
fn escaped(key: &str) -> String {
    let may = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&'*+-.^_`|~".contains(&byte);
    let one = |byte: u8| if may(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    key.bytes().map(one).collect()
}

/// One file. An empty name of the context is none: kubectl writes it where it has none yet.
fn read(path: &Path) -> Result<Kubeconfig, KubeconfigError> {
    let mut file = Kubeconfig::read_from(path)?;
    file.current_context = file.current_context.filter(|name| !name.is_empty());
    Ok(file)
}

/// Files in the order in which they count; those that are not there are left out.
fn merged(files: &[PathBuf]) -> Result<Kubeconfig> {
    let mut all = Kubeconfig::default();
    for path in files {
        match read(path) {
            Ok(file) => {
                let merged = all.merge(file);
                all = merged
                    .with_context(|| format!("cannot use {} beside the files before it", path.display()))?;
            }
            Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot use {}", path.display())),
        }
    }
    Ok(all)
}

/// What a pod with a service account knows of its cluster, as a file would say it.
fn of_pod(account: &Path) -> Option<Kubeconfig> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let host = variable("KUBERNETES_SERVICE_HOST")?;
    let port = variable("KUBERNETES_SERVICE_PORT")?;
    let token = account.join("token");
    if !token.is_file() {
        return None;
    }
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let named = || std::fs::read_to_string(account.join("namespace")).ok().map(|n| n.trim().to_owned());
    let context = Context {
        cluster: CHOSEN.to_owned(),
        user: Some(CHOSEN.to_owned()),
        namespace: variable("POD_NAMESPACE").or_else(named),
        ..Context::default()
    };
    let cluster = Cluster {
        server: Some(format!("https://{host}:{port}")),
        certificate_authority: Some(account.join("ca.crt").display().to_string()),
        ..Cluster::default()
    };
    let user = AuthInfo { token_file: Some(token.display().to_string()), ..AuthInfo::default() };
    Some(of_one(cluster, user, context))
}

/// A file with one of each, all of the name [`CHOSEN`].
fn of_one(cluster: Cluster, user: AuthInfo, context: Context) -> Kubeconfig {
    let name = CHOSEN.to_owned();
    Kubeconfig {
        clusters: vec![NamedCluster {
            name: name.clone(),
            cluster: Some(cluster),
            ..NamedCluster::default()
        }],
        auth_infos: vec![NamedAuthInfo {
            name: name.clone(),
            auth_info: Some(user),
            ..NamedAuthInfo::default()
        }],
        contexts: vec![NamedContext {
            name: name.clone(),
            context: Some(context),
            ..NamedContext::default()
        }],
        current_context: Some(name),
        ..Kubeconfig::default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    const FIRST: &str = "apiVersion: v1
kind: Config
current-context: ''
contexts:
- {name: one, context: {cluster: a, user: me, namespace: shop}}
- {name: bare, context: {cluster: a, user: gone, namespace: ''}}
clusters:
- {name: a, cluster: {server: 'https://a.test', certificate-authority: ca.pem, tls-server-name: a.inner}}
users:
- {name: me, user: {client-certificate-data: Yw==, client-key-data: aw==, as: other, as-groups: [old]}}
";
    const SECOND: &str = "current-context: one
clusters:
- {name: a, cluster: {server: 'https://not-this.test'}}
- {name: b, cluster: {server: 'https://b.test', insecure-skip-tls-verify: true}}
users:
- {name: you, user: {token: yours}}
";

    fn files() -> (tempfile::TempDir, Kubeconfig) {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["first", "missing", "second", "empty"].map(|name| dir.path().join(name));
        fs::write(&paths[0], FIRST).unwrap();
        fs::write(&paths[2], SECOND).unwrap();
        fs::write(&paths[3], "").unwrap();
        let all = merged(&paths).unwrap();
        (dir, all)
    }

    /// What a command line chooses of both files: the cluster, the user, and the namespace.
    fn chosen(line: &str) -> Result<(Cluster, AuthInfo, Option<String>)> {
        let (_dir, all) = files();
        let words = std::iter::once("culvert").chain(line.split_whitespace());
        let file = Line::try_parse_from(words)?.cluster.chosen(&all)?;
        let context = file.contexts[0].context.clone().unwrap();
        let (cluster, user) = (file.clusters[0].cluster.clone(), file.auth_infos[0].auth_info.clone());
        Ok((cluster.unwrap(), user.unwrap(), context.namespace))
    }

    #[test]
    fn files_are_merged_as_kubectl_merges_them() {
        let (dir, all) = files();
        assert_eq!(all.current_context.as_deref(), Some("one"), "an empty one does not count");
        assert_eq!(all.clusters.len(), 2);
        let (cluster, user, namespace) = chosen("").unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://a.test"), "the first that has it");
        assert!(user.client_certificate_data.is_some());
        assert_eq!(namespace.as_deref(), Some("shop"));
        assert_eq!(chosen("--context bare").unwrap().2, None, "an empty one is the default");
        // A broken one is never passed over.
        let broken = dir.path().join("broken");
        fs::write(&broken, "clusters: 7").unwrap();
        let said = format!("{:#}", merged(&[broken]).unwrap_err());
        assert!(said.contains("broken"), "{said}");
        // Paths in a file are from its directory.
        let authority = all.clusters[0].cluster.as_ref().unwrap().certificate_authority.clone().unwrap();
        assert!(Path::new(&authority).is_absolute() && authority.ends_with("/ca.pem"), "{authority}");
    }

    #[test]
    fn other_names_than_the_contexts_have_to_be_there() {
        let (cluster, user, _) = chosen("--cluster b --user you").unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://b.test"));
        assert!(user.token.is_some() && user.client_certificate_data.is_none());
        for (line, words) in [
            ("--context nosuch", "no context: nosuch"),
            ("--cluster nosuch", "no cluster nosuch"),
            ("--user nosuch", "no user nosuch"),
            ("--context bare --as-group g", "--as names"),
            ("--context bare --as-uid 7", "--as names"),
            ("--certificate-authority f --insecure-skip-tls-verify", "not to look"),
        ] {
            let said = chosen(line).unwrap_err().to_string();
            assert!(said.contains(words), "{line}: {said}");
        }
        // That the file names one which is not there is no error: the server says who may do what.
        assert!(chosen("--context bare").unwrap().1.token.is_none());
    }

    #[test]
    fn the_server_of_the_command_line_takes_no_name_and_no_plaintext_credentials() {
        let (cluster, user, _) = chosen("-s https://c.test:6443").unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://c.test:6443"));
        assert_eq!(cluster.tls_server_name, None);
        assert!(cluster.certificate_authority.is_some() && user.client_key_data.is_some());
        let (cluster, _, _) = chosen("--server=c.test --tls-server-name=c.inner").unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://c.test"), "the file has an authority");
        assert_eq!(cluster.tls_server_name.as_deref(), Some("c.inner"));
        let (_, user, _) = chosen("-s HTTP://127.0.0.1:8001 --token t").unwrap();
        assert!(user.token.is_none(), "a scheme has no case");
        let (cluster, user, _) = chosen("-s http://127.0.0.1:8001 --token t").unwrap();
        assert_eq!(cluster.server.as_deref(), Some("http://127.0.0.1:8001"));
        assert!(user.token.is_none() && user.client_key_data.is_none());
        assert_eq!(user.impersonate.as_deref(), Some("other"));
        let alone = Line::try_parse_from(["culvert", "-s", "127.0.0.1:8001"]).unwrap().cluster;
        let file = alone.chosen(&Kubeconfig::default()).unwrap();
        let server = file.clusters[0].cluster.clone().unwrap().server;
        assert_eq!(server.as_deref(), Some("http://127.0.0.1:8001"));
        let mut bare = merged(&[]).unwrap();
        let cluster = Cluster {
            server: Some("d.test".into()),
            certificate_authority: Some("/ca".into()),
            ..Cluster::default()
        };
        bare.clusters.push(NamedCluster {
            name: "d".into(),
            cluster: Some(cluster),
            ..NamedCluster::default()
        });
        let file =
            Line::try_parse_from(["culvert", "--cluster", "d"]).unwrap().cluster.chosen(&bare).unwrap();
        let server = file.clusters[0].cluster.clone().unwrap().server;
        assert_eq!(
            server.as_deref(),
            Some("https://d.test"),
            "a file's is completed as one of the command line"
        );
        assert!(
            Line::try_parse_from(["culvert"]).unwrap().cluster.chosen(&Kubeconfig::default()).is_err(),
            "no server"
        );
    }

    #[test]
    fn what_the_server_is_known_by_takes_the_place_of_the_files() {
        let (cluster, _, _) = chosen("--insecure-skip-tls-verify").unwrap();
        assert_eq!((cluster.insecure_skip_tls_verify, cluster.certificate_authority), (Some(true), None));
        let (cluster, _, _) = chosen("--insecure-skip-tls-verify=false").unwrap();
        assert!(cluster.certificate_authority.is_some());
        let (cluster, _, _) = chosen("--cluster b --certificate-authority /ca").unwrap();
        assert_eq!(cluster.insecure_skip_tls_verify, Some(false));
        assert_eq!(cluster.certificate_authority.as_deref(), Some("/ca"));
    }

    #[test]
    fn who_is_acted_as_is_read_as_kubectl_and_helm_read_it() {
        let (_, user, _) = chosen("--token t --as me --as-group a --as-group b,c --as-uid 7").unwrap();
        assert!(user.token.is_some() && user.client_certificate_data.is_none());
        assert_eq!(user.impersonate.as_deref(), Some("me"));
        assert_eq!(user.impersonate_groups, Some(vec!["a".to_owned(), "b,c".to_owned()]));
        let headers = more_of_whom_to_act_as(&user).unwrap();
        assert_eq!(headers[0], (HeaderName::from_static("impersonate-uid"), HeaderValue::from_static("7")));
        let (_, user, _) = chosen("--as me").unwrap();
        assert_eq!(user.impersonate.as_deref(), Some("me"));
        assert_eq!(user.impersonate_groups, Some(vec!["old".to_owned()]), "as client-go merges them");
        assert_eq!(escaped("example.com/Team%"), "example.com%2FTeam%25");
        let (_, user, _) = chosen("--client-certificate /c --client-key /k").unwrap();
        assert_eq!(
            (user.client_certificate.as_deref(), user.client_key.as_deref()),
            (Some("/c"), Some("/k"))
        );
        assert!(user.client_certificate_data.is_none() && user.client_key_data.is_none());
    }

    #[test]
    fn helm_acts_as_the_command_does() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let context = |more: &[&str]| {
            let words = ["culvert", "--kubeconfig", file.to_str().unwrap()];
            let line = Line::try_parse_from(words.iter().chain(more)).unwrap().cluster;
            let made = line.as_a_context("made").unwrap();
            made.map(|(text, list)| (serde_json::from_str::<serde_json::Value>(&text).unwrap(), list))
        };
        assert!(context(&["--token", "t"]).is_none(), "there is no file");
        fs::write(&file, format!("{FIRST}\n").replace("context: ''", "context: one")).unwrap();
        assert!(context(&[]).is_none());
        let (made, list) = context(&["--token", "t"]).unwrap();
        assert_eq!(list, file);
        let said = &made["contexts"][0];
        assert_eq!((&said["name"], &said["context"]["cluster"]), (&"made".into(), &"a".into()));
        // Beside the certificate of the file's user the token would not count.
        assert_eq!((&said["context"]["user"], &made["users"][0]["name"]), (&"made".into(), &"made".into()));
        let user = made["users"][0]["user"].as_object().unwrap();
        let said: Vec<_> = user.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| &**key).collect();
        assert_eq!((said, &user["token"]), (vec!["as", "as-groups", "token"], &"t".into()));
        let (made, _) = context(&["--cluster", "b"]).unwrap();
        assert_eq!(made["contexts"][0]["context"]["user"], "me");
        assert!(!made.to_string().contains("aw=="));
    }

    #[test]
    fn times_are_read_as_kubectl_reads_them() {
        assert_eq!(request_timeout("7"), Ok(Duration::from_secs(7)));
        assert_eq!(request_timeout("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(request_timeout("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(request_timeout("500ms"), Ok(Duration::from_millis(500)));
        assert!(["soon", "", "5x", "5m3"].iter().all(|wrong| request_timeout(wrong).is_err()));
    }
}
