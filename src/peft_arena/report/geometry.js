// Draws every chart of the page from the JSON in it; a chart with several choices has a menu.
"use strict";
const config = {
  displaylogo: false,
  responsive: true,
  plotlyServerURL: "",
  showSendToCloud: false,
  modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d"], // no button leaves the page
};
for (const chart of JSON.parse(document.getElementById("charts").textContent)) {
  const place = document.getElementById(chart.id);
  const plot = place.querySelector(".plot");
  const menu = place.querySelector("select");
  const draw = (index) => {
    const choice = chart.choices[index];
    const layout = { ...chart.layout, ...choice.layout };
    layout.annotations = [...(chart.layout.annotations || []), ...(choice.layout.annotations || [])];
    const data = choice.data.map((trace) => {
      const x = typeof trace.x === "number" ? choice.places[trace.x] : trace.x;
      return { ...chart.styles[trace.style], ...trace, x };
    });
    Plotly.react(plot, data, layout, config);
  };
  if (menu) menu.addEventListener("change", () => draw(Number(menu.value)));
  draw(0);
}
