// Parses Prometheus's text format and compares two readings.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([\w]+)="((?:[^"\\]|\\.)*)"/g;

/** {samples: Map of name → [{labels, value}…]}. */
export function parseMetrics(text) {
	const samples = new Map();
	for (const line of text.split('\n')) {
		const found = !line.startsWith('#') && line.match(LINE);
		if (!found) continue;
		const [, name, labels = '', value] = found;
		if (!samples.has(name)) samples.set(name, []);
		samples.get(name).push({
			labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, said]) => [key, said.replace(/\\(.)/g, '$1')])),
			value: Number(value.replace('Inf', 'Infinity')),
		});
	}
	return { samples };
}

const all = () => true;

/** Returns the sum of the samples whose labels pass; null if there are none. */
export function total({ samples }, name, passes = all) {
	const found = (samples.get(name) ?? []).filter(({ labels }) => passes(labels));
	return found.length ? found.reduce((sum, { value }) => sum + value, 0) : null;
}

/** Returns the growth of counters, each by itself; a smaller value means that it was reset. An engine may come back. */
export function growth(before, now, name, passes = all) {
	const named = ({ labels }) => JSON.stringify(labels);
	const was = new Map((before.samples.get(name) ?? []).map((one) => [named(one), one.value]));
	const found = (now.samples.get(name) ?? []).filter(({ labels }) => passes(labels));
	if (!found.length) return null;
	return found.reduce((sum, one) => {
		const first = was.get(named(one)) ?? ('engine' in one.labels ? one.value : 0);
		return sum + (one.value >= first ? one.value - first : one.value);
	}, 0);
}

/** Estimates a quantile of a histogram between two readings, like Prometheus; null without observations. */
export function quantile(before, now, name, q) {
	const bounds = new Map();
	for (const { labels, value } of now.samples.get(`${name}_bucket`) ?? []) {
		bounds.set(labels.le, (bounds.get(labels.le) ?? 0) + value);
	}
	for (const { labels, value } of before.samples.get(`${name}_bucket`) ?? []) {
		if (bounds.has(labels.le)) bounds.set(labels.le, bounds.get(labels.le) - value);
	}
	const steps = [...bounds].map(([bound, many]) => [bound === '+Inf' ? Infinity : Number(bound), many]).sort(([a], [b]) => a - b);
	const many = steps.at(-1)?.[1] ?? 0;
	if (many <= 0) return null;
	const wanted = q * many;
	let [below, under] = [0, 0];
	for (const [bound, upTo] of steps) {
		if (upTo >= wanted && upTo > under) {
			if (bound === Infinity) return below;
			return below + (bound - below) * ((wanted - under) / (upTo - under));
		}
		[below, under] = [bound, upTo];
	}
	return below;
}
