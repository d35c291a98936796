use super::*;

fn read(text: &str) -> Result<Option<Node<'_>>, SyntaxError> {
    let mut all = documents(text);
    let first = all.next().map_or(Ok(None), |d| parse(d, &Limits::default()));
    assert!(all.next().is_none(), "one document");
    first
}

fn value(text: &str) -> Value<'_> {
    read(text).unwrap().unwrap().value
}

#[test]
fn every_value_knows_where_it_stands() {
    let node = read("# c\na:\n  b: [1, {c: x}]\n").unwrap().unwrap();
    let at = |n: &Node<'_>| (n.position.line, n.position.column);
    let list = node.get("a").unwrap().get("b").unwrap();
    assert_eq!(at(list), (3, 6));
    let Value::Sequence(items) = &list.value else { panic!("a list") };
    assert_eq!(at(&items[0]), (3, 7));
    assert_eq!(at(items[1].get("c").unwrap()), (3, 14));
}

#[test]
fn plain_scalars_are_what_kubernetes_takes_them_for() {
    let s = |t: &'static str| Value::String(t.into());
    for (text, expected) in [
        ("yes", Value::Bool(true)),
        ("Off", Value::Bool(false)),
        ("y", Value::Bool(true)),
        ("yEs", s("yEs")),
        ("'yes'", s("yes")),
        ("017", Value::Int(15)),
        ("0o17", Value::Int(15)),
        ("0x1F", Value::Int(31)),
        ("-0b11", Value::Int(-3)),
        ("1_000", Value::Int(1000)),
        ("089", Value::Float(89.0)),
        ("1.", Value::Float(1.0)),
        (".5", Value::Float(0.5)),
        ("1e3", Value::Float(1000.0)),
        ("1.2.3", s("1.2.3")),
        ("10.0.0.1", s("10.0.0.1")),
        ("2001-01-01", s("2001-01-01")),
        ("1-2", s("1-2")),
        ("+-1", s("+-1")),
        ("0x-1", s("0x-1")),
        ("-", s("-")),
        ("inf", s("inf")),
        ("18446744073709551615", Value::Float(18_446_744_073_709_551_615.0)),
        ("!!str 7", s("7")),
        ("! 7", s("7")),
        ("!!int '7'", Value::Int(7)),
    ] {
        // As a value, since a lone "-" would start a list.
        let document = format!("k: {text}\n");
        if text == "-" {
            continue;
        }
        let node = read(&document).unwrap().unwrap();
        assert_eq!(node.get("k").unwrap().value, expected, "{text}");
    }
    assert!(read("k: !!binary aGk=").is_err());
    assert!(read("k: !mine x").is_err());
}

#[test]
fn a_key_that_stands_twice_is_refused_with_both_places() {
    let error = read("a: 1\nb: 2\n\"a\": 3\n").unwrap_err();
    let first = Position { line: 1, column: 1 };
    assert_eq!(error.position, Position { line: 3, column: 1 });
    assert_eq!(error.problem, Problem::DuplicateKey { key: "a".into(), first });
    let many = (0..40).map(|i| format!("k{i}: 1\n")).collect::<String>() + "k7: 2\n";
    assert!(matches!(read(&many).unwrap_err().problem, Problem::DuplicateKey { .. }));
}

#[test]
fn documents_are_split_where_their_markers_stand() {
    let text = "# head\n%YAML 1.2\n---\na: |\n  ---\n  x\n--- # c\n\n---\n---\nb: 1\n...\n# tail\n";
    let found: Vec<_> = documents(text).map(|d| (d.lines_before, parse(d, &Limits::default()))).collect();
    assert_eq!(found.len(), 2);
    let a = found[0].1.as_ref().unwrap().as_ref().unwrap().get("a").unwrap().clone();
    assert_eq!(a.value, Value::String("---\nx\n".into()));
    let b = found[1].1.as_ref().unwrap().as_ref().unwrap().get("b").unwrap().clone();
    assert_eq!(b.position, Position { line: 11, column: 4 });
    assert_eq!(documents("--- {a: 1}\n--- {b: 1}").count(), 2);
    assert_eq!(documents("---\r\na: 1\r\n---\r\nb: 1\r\n").count(), 2);
    assert_eq!(documents("").count(), 0);
    assert_eq!(documents("\u{feff}# nothing\n").count(), 0);
}

#[test]
fn aliases_and_merges_are_resolved() {
    let v = read("base: &b {x: 1, z: 2}\nuse:\n  <<: *b\n  z: 3\n").unwrap().unwrap();
    let used = v.get("use").unwrap();
    assert_eq!(used.get("x").unwrap().value, Value::Int(1));
    assert_eq!(used.get("z").unwrap().value, Value::Int(3));
    assert!(read("a: &a [*a]").is_err(), "an anchor inside itself");
    assert!(read("a: *nowhere").is_err());
}

#[test]
fn what_costs_too_much_is_refused() {
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let list = vec![format!("*a{}", i - 1); 10].join(", ");
        laughs.push_str(&format!("a{i}: &a{i} [{list}]\n"));
    }
    assert!(matches!(read(&laughs).unwrap_err().problem, Problem::TooLarge(_)));
    let deep = "[".repeat(200);
    assert!(matches!(read(&deep).unwrap_err().problem, Problem::TooLarge(_)));
    let limits = Limits { nodes: 10, ..Limits::default() };
    let text = Text { text: "[1,2,3,4,5,6,7,8,9,10,11]", lines_before: 0 };
    assert!(matches!(parse(text, &limits).unwrap_err().problem, Problem::TooLarge(_)));
    let limits = Limits { document_bytes: 10, ..Limits::default() };
    assert!(matches!(parse(text, &limits).unwrap_err().problem, Problem::TooLarge(_)));
    // A long string that is copied often.
    let text = format!("a: &a \"{}\\n\"\nb: [{}]\n", "x".repeat(100_000), vec!["*a"; 2000].join(","));
    assert!(matches!(read(&text).unwrap_err().problem, Problem::TooLarge(_)));
}

#[test]
fn what_is_not_yaml_is_refused_with_its_place() {
    let error = read("a: 1\nb: [1,\nc: 2\n").unwrap_err();
    assert!(error.position.line >= 2, "{error}");
    for text in ["a: b: c", "a: \u{0} b", "? [x]\n: y", "a: 'x", "{a: 1", "~: 1", "{? {a: 1} : b}"] {
        assert!(read(text).is_err(), "{text:?}");
    }
    let error = read("a: 1\nüb: \u{1}x").unwrap_err();
    assert_eq!(error.position, Position { line: 2, column: 5 });
}

#[test]
fn json_is_yaml() {
    let v = value(r#"{"a": [1, 2.5, true, null, "x\u00e9\n"], "b": {}}"#);
    let Value::Mapping(entries) = v else { panic!("a mapping") };
    let Value::Sequence(items) = &entries[0].value.value else { panic!("a list") };
    assert_eq!(items[4].value, Value::String("xé\n".into()));
    assert_eq!(items[3].value, Value::Null);
}

#[test]
fn json_with_characters_in_two_halves_is_read() {
    let text = r#"{"a": "\ud83d\ude00 \u003c \/ \\ud83d\\ude00", "\uD834\uDD1E": [{"b": "\ud83d\ude00"}]}"#;
    let Value::Mapping(entries) = value(text) else { panic!("a mapping") };
    assert_eq!(entries[0].value.value, Value::String("😀 < / \\ud83d\\ude00".into()));
    assert_eq!(entries[1].key, "𝄞");
    assert!(
        matches!(&entries[1].value.value, Value::Sequence(items) if items[0].get("b").unwrap().as_str() == Some("😀"))
    );
    // A half alone, or two of one kind, is no character; nor does YAML that is not JSON have any.
    for text in [
        r#"{"a": "\ud83d"}"#,
        r#"{"a": "\ude00\ud83d"}"#,
        r#"{"a": "\ud83d\ud83d"}"#,
        r#"{"a": "\ud83d\u+e00"}"#,
        r#"a: "\ud83d\ude00""#,
        r#"{"a": "\"#,
    ] {
        assert!(read(text).is_err(), "{text}");
    }
}

/// What both readers make of a text, where the quick one reads it at all.
fn compare(text: &str) -> bool {
    let mut read = false;
    for document in documents(text) {
        let limits = Limits::default();
        if let Some(quick) = plain::parse(document, &limits) {
            assert_eq!(parse_any(document, &limits), Ok(Some(quick)), "{text}");
            read = true;
        }
    }
    read
}

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: app-1
  labels:
    app.kubernetes.io/name: app
    on: off
spec:
  containers:
  - name: main
    args: [\"-c\", 'x', 1, true]
    ports:
      - containerPort: 8080
        name: http
  -
  - - a
    - b:
  empty:
  serviceAccountName: \"a\\\"b\"
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
";

#[test]
fn the_quick_reader_reads_what_programs_write() {
    assert!(compare(POD));
    for text in [
        "---\na: 1\n# c\n\nb:\n- x\n- y: 1\n  z: 2\nc: a b c\nd: http://x:80/#y\n",
        "{\"a\": [1, 2.5, true, null, \"x\\n\"], \"b\": {}, \"c\":{\"d\":\"e\"}}\n",
        "{\n  \"a\": [\n    1,\n    {\"b\": []}\n  ]\n}\n",
        "a:\n  b:\n    c: -1\n  d: ~\ne:",
        "- a\n- - b\n  - c\n-\n  d: e\n",
    ] {
        assert!(compare(text), "{text}");
    }
}

mod readers {
    use proptest::prelude::*;

    use super::{POD, compare};

    /// A value in block style at an indentation, mostly of the kind that the quick reader takes.
    fn block(depth: u32) -> BoxedStrategy<Vec<String>> {
        let scalar = prop_oneof![
            20 => "[a-z]{1,5}",
            10 => "-?[0-9]{1,3}(\\.[0-9])?",
            1 => "[ -~]{0,12}",
            2 => "\"[ -~]{0,6}\"",
            4 => "'[a-z ]{0,6}'",
            2 => "(yes|no|~|null|true|0x1f|1e3|\\.5|10\\.0\\.0\\.1|a:b|a: b|a #b|a#b|- a|\\? a|&a b|\\*a|!t a|\\||>)",
            1 => "\\[(a|1|\"b\"|'c'|\\{\\}| |,|:){0,6}\\]",
            1 => "\\{(a: 1|\"b\":2|'c': d|a:b|, |,| ){0,5}\\}",
            4 => Just(String::new()),
        ];
        let one_line = scalar.prop_map(|s| vec![s]).boxed();
        if depth == 0 {
            return one_line;
        }
        let key = prop_oneof![30 => "[a-j]", 3 => "[a-c./_-]{1,4}", 1 => "(y|1|\"a\"|a b|on|-)"];
        let mapping =
            proptest::collection::vec((key, block(depth - 1), 0..4usize, ends()), 1..4).prop_map(|entries| {
                entries.into_iter().flat_map(|(k, v, i, e)| entry(&format!("{k}:"), &v, i, &e)).collect()
            });
        let list = proptest::collection::vec((block(depth - 1), 0..4usize, ends()), 1..4)
            .prop_map(|items| items.into_iter().flat_map(|(v, i, e)| entry("-", &v, i, &e)).collect());
        prop_oneof![2 => one_line, 4 => mapping, 3 => list].boxed()
    }

    fn ends() -> impl Strategy<Value = String> {
        prop_oneof![80 => Just(""), 1 => Just(" "), 1 => Just(" # c"), 1 => Just("\n"), 1 => Just("\n# c")]
            .prop_map(str::to_owned)
    }

    /// `head` with its value: behind it where that is one line, or a block below or beside a dash.
    fn entry(head: &str, value: &[String], indent: usize, end: &str) -> Vec<String> {
        let block = value.len() > 1 || value[0].starts_with("- ") || value[0].ends_with(':');
        if !block {
            let space = if value[0].is_empty() { "" } else { " " };
            return vec![format!("{head}{space}{}{end}", value[0])];
        }
        let pad = " ".repeat(indent);
        if head == "-" && indent > 0 {
            let pad = " ".repeat(indent);
            let mut lines = value.iter().map(|l| format!(" {pad}{l}"));
            let first = format!("-{}", lines.next().unwrap());
            return std::iter::once(first).chain(lines.map(|l| format!(" {l}"))).collect();
        }
        std::iter::once(format!("{head}{end}")).chain(value.iter().map(|l| format!("{pad}{l}"))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn agree_on_what_programs_and_people_write(lines in block(3)) {
            compare(&(lines.join("\n") + "\n"));
        }

        #[test]
        fn agree_on_a_manifest_with_any_change(
            at in 0..POD.len(),
            cut in 0..4usize,
            insert in "[a-z]{0,2}|[ -~\n]{0,3}|\n  - |: |\n\n|#| #|\"|'|\\{|\\}|\\[|\\]|,|&|\\*|!|\\||>|%|@|`|\\?|---|\t|é",
        ) {
            let (head, tail) = POD.split_at(at);
            compare(&format!("{head}{insert}{}", tail.get(cut..).unwrap_or_default()));
        }

        #[test]
        fn agree_on_json(value in "[\\[\\]{},:\"a1 \n]{0,40}|\\{\"a\": ?[\\[\\]{},:\"a1 \n]{0,40}\\}") {
            compare(&value);
        }
    }
}
