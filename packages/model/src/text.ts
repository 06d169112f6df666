/** Owns the entry of whoever needs text only: a thread that tokenizes starts in half the time without graphs and hub. */
export { loadTokenizer } from './tokenizer.ts';
export { tokenizerDigest } from './tokenizer-files.ts';
