use super::*;

#[test]
fn lists_of_a_tokens_message_belong_together() {
    let others = |ids: &[TokenId]| pb::Alternatives {
        tokens: ids.iter().map(|&id| pb::Alternative { id, logprob: -2.0 }).collect(),
    };
    let two = |alternatives| tokens(vec![5, 6], vec![-0.5, -1.0], alternatives);
    let expected = |alternatives: [Vec<(TokenId, f32)>; 2]| {
        let [first, second] = alternatives;
        let token = |id, logprob, alternatives| Token {
            id,
            logprob,
            alternatives,
        };
        Some(vec![token(5, -0.5, first), token(6, -1.0, second)])
    };
    assert_eq!(two(vec![]), expected([vec![], vec![]]));
    assert_eq!(
        two(vec![others(&[1, 2]), others(&[])]),
        expected([vec![(1, -2.0), (2, -2.0)], vec![]])
    );
    assert_eq!(two(vec![others(&[1])]), None);
    assert_eq!(two(vec![others(&[1]); 3]), None);
    assert_eq!(tokens(vec![5, 6], vec![-0.5], vec![]), None);
    assert_eq!(tokens(vec![5], vec![-0.5, -1.0], vec![]), None);
}
