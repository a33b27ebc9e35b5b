"use strict";
// What the page says: the equations of each memory with what to look for, those of the backward, and the experiments.

const LONGEST = 24;                             // positions
const sub = (letter, index = "t") => `<i>${letter}<sub>${index}</sub></i>`;
const T = "<sup>⊤</sup>", A_T = "Diag(e<sup><i>g</i></sup>)", BEFORE_T = sub("S", "t−1");
const [S_T, P_T, K_T, V_T, Q_T] = Array.from("SPkvq", letter => sub(letter));
const equation = (...parts) => parts.map(part => `<span class="keep">${part}</span>`).join(" &ensp; ");

const READ = `${sub("o")} = ${S_T}${T} ${Q_T}`;
const EQUATIONS = {
  attention: [
    equation(`${S_T} = ${BEFORE_T} + φ(${K_T}) ${V_T}${T},`, `${sub("z")} = ${sub("z", "t−1")} + φ(${K_T}),`,
      `${sub("o")} = ${S_T}${T}φ(${Q_T}) / (${sub("z")}${T}φ(${Q_T}) + ε)`),
    "The last column, with colours of its own range, is <i>z</i>, the sum of all mapped keys: with a 1 appended to each <i>v</i>, the "
    + "normaliser is one more value. Nothing is ever taken out.",
  ],
  linear: [
    equation(`${S_T} = ${BEFORE_T} + ${K_T} ${V_T}${T},`, READ),
    "Each write is added on top of all that is there. A key that comes twice gets the sum of both values.",
  ],
  gated: [
    equation(`${S_T} = ${A_T} ${BEFORE_T} + ${K_T} ${V_T}${T},`, READ),
    "Before each write everything fades by <i>a</i> = e<sup><i>g</i></sup>. Lower the decay and the map of who looks at whom shrinks to its "
    + "diagonal.",
  ],
  delta: [
    equation(`${S_T} = ${BEFORE_T} + β ${K_T} (${V_T} − ${BEFORE_T}${T}${K_T})${T},`, READ),
    "What the state already says under the key is subtracted first: only the error is written. Where nothing is new, nothing is written.",
  ],
  gated_delta: [
    equation(`${P_T} = ${A_T} ${BEFORE_T},`, `${S_T} = ${P_T} + β ${K_T} (${V_T} − ${P_T}${T}${K_T})${T},`, READ),
    "Everything fades, then the error under the key is written: the decay forgets what nobody asks for, the correction what is out of date.",
  ],
};

const OUTPUT_BACK = [`<i>R</i> ← <i>R</i> + <i>q</i> d<i>o</i>${T},`, "d<i>q</i> = <i>S</i> d<i>o</i>,"];
const GRADIENTS = {
  attention: [
    `<i>G</i> = (d<i>o</i> | −d<i>o</i>${T}<i>o</i>) / den,`, `<i>R</i> ← <i>R</i> + φ(<i>q</i>) <i>G</i>${T},`,
    "dφ(<i>q</i>) = (<i>S</i> | <i>z</i>) <i>G</i>,", "dφ(<i>k</i>) = <i>R</i> (<i>v</i>, 1),", `d<i>v</i> = <i>R</i>${T}φ(<i>k</i>)`,
  ],
  add: [...OUTPUT_BACK, "d<i>k</i> = <i>R v</i>,", `d<i>v</i> = <i>R</i>${T}<i>k</i>`],
  correct: [
    ...OUTPUT_BACK, `d<i>v</i> = β <i>R</i>${T}<i>k</i>,`, "d<i>k</i> = <i>R u</i> − <i>P</i> d<i>v</i>,", `dβ = <i>e</i>${T}<i>R</i>${T}<i>k</i>,`,
    `<i>R</i> ← <i>R</i> − <i>k</i> d<i>v</i>${T}`,
  ],
  fade: ["d<i>g</i> = Σ <i>P</i> ⊙ <i>R</i>,", `<i>R</i> ← ${A_T} <i>R</i>`],
};

// title, what to set (all else as at the start), what to look for
const EXPERIMENTS = [
  ["Start", { t: 11 },
    "Linear attention as in the paper, on abracadabra. Press play and watch the state fill; compare the first two maps of “Who looks at whom”. "
    + "elu1 is positive, so all keys have much in common, and every answer leans towards what is stored most often. Then choose another feature "
    + "map, or rule delta."],
  ["Overwrite", { text: "abaca", mechanism: "delta", map: "identity", beta: 1, t: 5 },
    "a was followed by b, then by c: the same key is written twice. Asked for a, rule delta answers c, since position 4 took b out before it "
    + "wrote c. Now choose rule linear: b and c in equal parts."],
  ["Half a write", { text: "abacacac", mechanism: "delta", map: "identity", beta: 0.5, t: 8 },
    "With β = 0.5 half of the error is written each time: after a, the share of b halves with every c. Move β and watch row a of “What it "
    + "knows”."],
  ["Forget", { text: "aaaaaaaaaaaa", mechanism: "gated", map: "identity", decay: 0.7, t: 12 },
    "One key at all positions but the first, so nothing but age tells them apart: each weight of the third map is 0.7 to the power of its age. "
    + "Set the decay to 1 and all count alike; set it to 0 and each position sees only itself."],
  ["Nearly softmax", { mechanism: "attention", map: "taylor2", sharpness: 1.5, t: 11 },
    "taylor2 is the beginning of the exponential series: with 73 features in place of 8 its map is nearly that of softmax. Raise the sharpness, "
    + "and the series is too short: softmax grows sharper, taylor2 lags behind."],
  ["Smooth a curve", { mode: "curve", mechanism: "attention", map: "relu2", sharpness: 12, t: LONGEST },
    "Attention with positions for keys is smoothing: what is remembered is a weighted mean of the heights nearby. Lower the sharpness and both "
    + "curves go flat. Then choose rule delta with the identity, and draw your own."],
  ["Overshoot", { text: "aaaaaaaa", mechanism: "delta", map: "identity", unit: false, sharpness: 2.5, beta: 1, t: 8 },
    "Without length 1, β|k|² is 2.5. Beyond 2 each write corrects by more than the error that it found: the state swings and grows. Set the "
    + "sharpness to 2, then to 1, or β to 0.4."],
];
