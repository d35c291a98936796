use super::super::authenticate::BoundPod;
use super::*;

/// namespace, name, uid, node, account, finished
type Row = (&'static str, &'static str, &'static str, Option<&'static str>, &'static str, bool);

/// Two nodes; the proxies of both, a shop on the first, a bank on the second, a job that is over on the first.
const PODS: &[Row] = &[
    ("culvert-system", "ztunnel-1", "z1", Some("node-1"), "ztunnel", false),
    ("culvert-system", "ztunnel-2", "z2", Some("node-2"), "ztunnel", false),
    ("culvert-system", "ztunnel-old", "z0", Some("node-1"), "ztunnel", true),
    ("culvert-system", "ztunnel-new", "z3", None, "ztunnel", false),
    ("culvert-system", "other", "o1", Some("node-1"), "culvertd", false),
    ("shop", "cart-1", "c1", Some("node-1"), "cart", false),
    ("shop", "job-1", "j1", Some("node-1"), "job", true),
    ("bank", "ledger-1", "l1", Some("node-2"), "ledger", false),
];

struct Table;

impl Pods for Table {
    fn is_ready(&self) -> bool {
        true
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts> {
        let row = PODS.iter().find(|row| row.0 == namespace && row.1 == name)?;
        Some(PodFacts {
            uid: row.2.into(),
            node: row.3.map(Into::into),
            service_account: row.4.into(),
            finished: row.5,
        })
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        PODS.iter().any(|row| row.0 == namespace) || namespace == "empty"
    }

    fn runs_on(&self, node: &str, namespace: &str, account: &str) -> bool {
        PODS.iter().any(|row| row.0 == namespace && row.3 == Some(node) && row.4 == account && !row.5)
    }
}

fn rules() -> Rules {
    Rules { domain: TrustDomain::cluster_local(), trusted: vec!["culvert-system/ztunnel".parse().unwrap()] }
}

/// `account@pod/uid/node`, parts left out from the end.
fn caller(text: &str) -> Caller {
    let (account, pod) = text.split_once('@').map_or((text, None), |(account, pod)| (account, Some(pod)));
    let account: Account = account.parse().unwrap();
    let pod = pod.map(|pod| {
        let mut parts = pod.split('/').map(str::to_owned);
        BoundPod { name: parts.next().unwrap(), uid: parts.next().unwrap(), node: parts.next() }
    });
    Caller { namespace: account.namespace, service_account: account.name, pod }
}

const Z1: &str = "culvert-system/ztunnel@ztunnel-1/z1/node-1";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const LEDGER: &str = "spiffe://cluster.local/ns/bank/sa/ledger";
const OWN_Z: &str = "spiffe://cluster.local/ns/culvert-system/sa/ztunnel";

/// What, who asks, for whom, who he gets or why he gets nobody.
type Case = (&'static str, &'static str, Option<&'static str>, Result<&'static str, &'static str>);

const CASES: &[Case] = &[
    ("a node's proxy, for a pod of its node", Z1, Some(CART), Ok(CART)),
    ("the same, a token without the node", "culvert-system/ztunnel@ztunnel-1/z1", Some(CART), Ok(CART)),
    ("the same, for itself", Z1, None, Ok(OWN_Z)),
    ("the same, for itself by name", Z1, Some(OWN_Z), Ok(OWN_Z)),
    ("for a pod of another node", Z1, Some(LEDGER), Err("not_on_node")),
    ("the other node's proxy", "culvert-system/ztunnel@ztunnel-2/z2/node-2", Some(LEDGER), Ok(LEDGER)),
    ("for a pod that is over", Z1, Some("spiffe://cluster.local/ns/shop/sa/job"), Err("not_on_node")),
    (
        "for an account that nobody runs as",
        Z1,
        Some("spiffe://cluster.local/ns/empty/sa/x"),
        Err("not_on_node"),
    ),
    (
        "for a namespace that is not there",
        Z1,
        Some("spiffe://cluster.local/ns/nowhere/sa/x"),
        Err("unknown_namespace"),
    ),
    (
        "for another trust domain",
        Z1,
        Some("spiffe://evil.example/ns/shop/sa/cart"),
        Err("foreign_trust_domain"),
    ),
    ("for no identity", Z1, Some("shop/cart"), Err("no_identity")),
    ("for an identity with a way out", Z1, Some("spiffe://cluster.local/ns/../sa/x"), Err("no_identity")),
    (
        "its token says another node",
        "culvert-system/ztunnel@ztunnel-1/z1/node-2",
        Some(LEDGER),
        Err("node_mismatch"),
    ),
    ("its pod is gone", "culvert-system/ztunnel@ztunnel-9/z9/node-1", Some(CART), Err("no_such_pod")),
    ("its pod was replaced", "culvert-system/ztunnel@ztunnel-1/z0/node-1", Some(CART), Err("no_such_pod")),
    ("its pod is over", "culvert-system/ztunnel@ztunnel-old/z0/node-1", Some(CART), Err("no_such_pod")),
    ("its pod is on no node", "culvert-system/ztunnel@ztunnel-new/z3", Some(CART), Err("no_such_pod")),
    ("its pod is of another account", "culvert-system/ztunnel@other/o1", Some(CART), Err("no_such_pod")),
    ("its token is of no pod", "culvert-system/ztunnel", Some(CART), Err("unbound_token")),
    ("a workload, for itself", "shop/cart@cart-1/c1/node-1", None, Ok(CART)),
    ("a workload, for itself by name", "shop/cart@cart-1/c1/node-1", Some(CART), Ok(CART)),
    ("a workload, for its neighbour", "shop/cart@cart-1/c1/node-1", Some(OWN_Z), Err("not_trusted")),
    ("a workload, its pod gone", "shop/cart@cart-7/c7", None, Err("no_such_pod")),
    ("a machine outside, for itself", "shop/cart", None, Ok(CART)),
    ("a machine outside, for another", "shop/cart", Some(LEDGER), Err("not_trusted")),
    ("an account of the name elsewhere", "shop/ztunnel", Some(CART), Err("not_trusted")),
    ("another account of the namespace", "culvert-system/culvertd@other/o1", Some(CART), Err("not_trusted")),
];

#[test]
fn who_gets_which_identity() {
    for (what, who, asked, expected) in CASES {
        let decided = decide(&caller(who), *asked, &rules(), &Table);
        match (decided, expected) {
            (Ok(id), Ok(expected)) => assert_eq!(id.to_string(), *expected, "{what}"),
            (Err(denied), Err(reason)) => {
                assert_eq!(denied.reason(), *reason, "{what}: {denied}");
                assert!(!denied.to_string().is_empty());
            }
            (decided, expected) => panic!("{what}: {decided:?}, expected {expected:?}"),
        }
    }
}

#[test]
fn a_refusal_says_who_asked_for_whom_and_where() {
    let denied = decide(
        &caller("culvert-system/ztunnel@ztunnel-1/z1/node-1"),
        Some("spiffe://cluster.local/ns/bank/sa/ledger"),
        &rules(),
        &Table,
    )
    .unwrap_err();
    assert_eq!(
        denied.to_string(),
        "culvert-system/ztunnel (pod ztunnel-1) on node node-1 asks for spiffe://cluster.local/ns/bank/sa/ledger, of \
         which no pod runs on that node"
    );
    assert!(denied.may_pass());
}
