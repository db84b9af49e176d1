// Formats numbers, sizes and times.
import { parsed } from '../reading/samples.js';

const number = new Intl.NumberFormat('en', { maximumFractionDigits: 1 });
const when = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

export const figure = (value) => number.format(value).replace('-', '−');

export const count = (value, one, many = `${one}s`) => `${number.format(value)} ${value === 1 ? one : many}`;

export const percent = (share) => `${figure(share * 100)} %`;

export const titled = (name) => name[0].toUpperCase() + name.slice(1);

export const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export function bytes(size) {
	if (size < 1024) return count(size, 'byte');
	return size < 1 << 20 ? `${number.format(size / 1024)} KiB` : `${number.format(size / (1 << 20))} MiB`;
}

export function milliseconds(value) {
	if (value == null || Number.isNaN(value)) return '–';
	if (value >= 10_000) return `${number.format(value / 1000)} s`;
	return `${value >= 10 ? Math.round(value) : number.format(value)} ms`;
}

export const loss = (value) => (value == null ? '–' : value.toFixed(3));

export const moment = (iso) => (iso ? when.format(new Date(iso)) : '–');

/** Items of pasted text: it is split at empty lines, or into lines if there are none; a JSON object is an item itself. */
export function pieces(pasted) {
	const plain = pasted.replaceAll('\r\n', '\n').trim();
	const split = /\n\s*\n/.test(plain) ? plain.split(/\n\s*\n/) : plain.split('\n');
	return split.map((piece) => piece.trim()).filter(Boolean).map((text) => (text.startsWith('{') && parsed(text)) || { text });
}

export const SOURCES = {
	topic: 'by topic: these anchors write about similar topics',
	signature: 'by evidence: these anchors predict this user’s texts best',
};

export const LEVELS = {
	base: 'base model',
	common: 'what all users share, for comparison',
	merged: 'merged from anchors',
	stacked: 'merged, with an adapter of their own',
};
