// Curves drawn with uPlot in the page's colours; uPlot is loaded on first use.
import { html, useEffect, useRef } from './html.js';

const height = 240;
const dark = matchMedia('(prefers-color-scheme: dark)');

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * Curves over one axis.
 *
 * `series` is [{label, points: [[x, y]…], dots}…]; `said` is the description for screen readers.
 */
export function Chart({ series, across, up, said }) {
	const place = useRef();
	const plot = useRef();
	const shown = useRef();
	shown.current = aligned(series);
	useEffect(() => {
		let gone = false;
		const draw = async () => {
			const { default: UPlot } = await import('../vendor/uplot.js');
			if (gone) return;
			plot.current?.destroy();
			const width = place.current.clientWidth;
			plot.current = new UPlot(options(series, across, up, width), shown.current, place.current);
		};
		const sized = new ResizeObserver(([{ contentRect }]) => plot.current?.setSize({ width: contentRect.width, height }));
		draw().then(() => !gone && sized.observe(place.current));
		dark.addEventListener('change', draw);
		return () => {
			gone = true;
			sized.disconnect();
			dark.removeEventListener('change', draw);
			plot.current?.destroy();
		};
	}, []);
	useEffect(() => plot.current?.setData(shown.current));
	return html`<figure class="chart">
		<div ref=${place} role="img" aria-label=${said}></div>
		<figcaption>${series.map(({ label, dots }, index) => html`<span key=${label} class=${`key key-${index}`}>
			<i class=${dots ? 'dots' : ''} aria-hidden="true"></i>${label}</span>`)}</figcaption>
	</figure>`;
}

/** Converts to uPlot's format: one list of x, and a y or a gap for each. Points of a series may share an x. */
function aligned(series) {
	const points = series.flatMap(({ points: own }, index) => own.map(([x, y]) => [x, index + 1, y]));
	const rows = [];
	for (const [x, index, y] of points.sort(([a], [b]) => a - b)) {
		if (rows.at(-1)?.[0] !== x || rows.at(-1)[index] !== undefined) rows.push([x]);
		rows.at(-1)[index] = y;
	}
	return [0, ...series].map((_, column) => rows.map((row) => row[column]));
}

function options(series, across, up, width) {
	const [ink, line] = [colour('--dim'), colour('--line')];
	const axis = (label) => ({
		label, stroke: ink, labelSize: 18, labelGap: 2, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 },
		font: '12px system-ui, sans-serif', labelFont: '12px system-ui, sans-serif',
	});
	return {
		width,
		height,
		legend: { show: false },
		cursor: { show: false },
		scales: { x: { time: false } },
		axes: [{ ...axis(across), incrs: [1, 2, 5, 10, 20, 50, 100, 200] }, { ...axis(up), size: 52 }],
		series: [{}, ...series.map(({ label, dots }, index) => ({
			label,
			stroke: colour(`--curve-${index}`),
			width: dots ? 0 : 2,
			spanGaps: true,
			points: { show: dots, size: 9, fill: colour(`--curve-${index}`) },
		}))],
	};
}
